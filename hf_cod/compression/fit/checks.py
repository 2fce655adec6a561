"""Checks of a model before any work. Each raises ValueError (or ImportError) if a method cannot be applied to it."""

from __future__ import annotations

from torch import nn

from hf_cod.compression.experts.planning import check_number
from hf_cod.layers.checks import check_writable
from hf_cod.layers.independence import check_independent
from hf_cod.layers.removal.drop import check_drop
from hf_cod.layers.removal.experts import LEAST_OF_GROUP, groups_of, mixtures_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.unit_discovery import find_all_units
from hf_cod.models.shaping import check_shapeable
from hf_cod.models.stored_config import check_storable


def numbers_of_experts(model: nn.Module, layers_path: str | None) -> list[float]:
    """Numbers of experts that can be removed from each mixture, up to half of them."""
    stack = find_decoder_layers(model, layers_path)
    count, groups = next(iter(mixtures_of(stack).values())).count, groups_of(stack.config)
    least = LEAST_OF_GROUP * groups if groups > 1 else 1
    return [float(number) for number in range(groups, 1 + count // 2, groups) if count - number >= least]


def check_depth(stack: DecoderLayers) -> None:
    """A third of at least three independent layers can be removed."""
    if len(stack) < 3:
        raise ValueError(f"layers: expected at least 3, of which up to a third are removed, got {len(stack)}")
    check_independent(stack, "layers")
    check_drop(stack.model, len(stack) - 1, stack.layers_path)  # all other layers keep their indices


def has_experts(stack: DecoderLayers) -> bool:
    """Whether the model is a mixture of experts."""
    return any(stack.expert_sets(index) for index in range(len(stack)))


def check_experts(stack: DecoderLayers) -> None:
    """Some experts can be removed from each mixture."""
    numbers = numbers_of_experts(stack.model, stack.layers_path)
    if not numbers:
        count, groups = next(iter(mixtures_of(stack).values())).count, groups_of(stack.config)
        raise ValueError(f"experts: expected so many that some can be removed, got {count} in {groups} groups")
    check_number(stack, int(numbers[0]))


def check_stored(stack: DecoderLayers) -> None:
    """The weights are plain ones in memory, and the config can say how they are stored."""
    check_storable(stack.model)
    check_writable(stack)


def check_sparsity(stack: DecoderLayers) -> None:
    """The same, and zeros can be stored without numbers: those of banks of experts cannot."""
    check_stored(stack)
    banks = [matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)]
    if banks:
        weights = sum(matrix.parameter.numel() for matrix in banks)
        share = weights / sum(stack.count_weights(index) for index in range(len(stack)))
        raise ValueError(
            f"model: expected Linears, which are packed without their zeros, got banks of experts with {share:.0%} of "
            "the weights, which are not packed"
        )


def check_rank(stack: DecoderLayers) -> None:
    """The weights are plain ones in memory, and the model can have matrices of other shapes."""
    check_shapeable(stack.model)
    check_writable(stack)


def check_width(stack: DecoderLayers) -> None:
    """The same, the layers are independent, and there are heads or channels to remove."""
    check_rank(stack)
    check_independent(stack, "model")
    units = find_all_units(stack)
    if not any(layer.found for layer in units):
        raise ValueError(f"model: expected heads or channels of a known structure, got none; {units[0].whole[0]}")


def check_bits(stack: DecoderLayers) -> None:
    """The weights can be stored in few bits, none of them is in factors of a bank, and bitsandbytes is installed."""
    import hf_cod.compression.quantization.bnb  # noqa: F401 - fails before any work if bitsandbytes is missing

    check_stored(stack)
