"""The share of the layers that each method leaves, of weights that it can change and of those that it cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_cod.compression.fit.settings import KINDS
from hf_cod.compression.quantization.quantizable import quantizable
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.module_choice import matrix_sizes
from hf_cod.layers.removal.experts import mixtures_of
from hf_cod.layers.size import size_of
from hf_cod.layers.stack import DecoderLayers

# Bits a weight of scales, in addition to codes; more if the length of rows is not a multiple of the block.
SCALES = 0.127


def fixed_share(stack: DecoderLayers, kind: str) -> float:
    """The share of the layers in matrices that the model uses beside calling their modules (T5's `wo`), in the unit of
    a budget: of bytes, or of weights. They keep their form, so that only methods that remove structure make them
    smaller.

    Args:
        stack: the layers of the intact model.
        kind: one of `KINDS`.
    """
    assert kind in KINDS
    reasons = direct_use(stack.model).reasons
    linears: list[tuple[str, Any]] = [item for index in range(len(stack)) for item in stack.linears(index).items()]
    weights: list[Tensor] = [module.weight for name, module in linears if name in reasons]
    size = size_of(stack.model, stack.layers_path)
    if kind == "parameter_share":
        return sum(weight.numel() for weight in weights) / size.layer_weights
    return sum(weight.nbytes for weight in weights) / size.layer_bytes


def left_by_depth(stack: DecoderLayers, count: float) -> float:
    """The share if the largest layers are removed."""
    sizes = sorted(stack.count_weights(index) for index in range(len(stack)))
    return sum(sizes[: len(sizes) - int(count)]) / sum(sizes)


def left_by_experts(stack: DecoderLayers, number: float) -> float:
    """The share if so many experts of each mixture are removed."""
    total = sum(stack.count_weights(index) for index in range(len(stack)))
    return 1 - sum(sum(each.sizes()) * number / each.count for each in mixtures_of(stack).values()) / total


def left_by_share(stack: DecoderLayers, share: float) -> float:
    """The share that is not removed."""
    return 1 - share


def left_by_sparsity(stack: DecoderLayers, share: float) -> float:
    """The share with the mask of one bit a weight; matrices of `fixed_share` are not packed."""
    fixed = fixed_share(stack, "memory")
    return fixed + (1 - fixed) * (1 - share + 1 / _bits_a_weight(stack))


def left_by_bits(stack: DecoderLayers, codes: float) -> float:
    """The share with so many bits a weight, without scales; matrices that are not quantized keep theirs."""
    sizes, (_, excluded) = matrix_sizes(stack), quantizable(stack, StorageSettings())
    whole = sum(sizes[name] for name in excluded) / sum(sizes.values())
    return whole + (1 - whole) * (codes + SCALES) / _bits_a_weight(stack)


def _bits_a_weight(stack: DecoderLayers) -> int:
    return 8 * next(stack.module_list.parameters()).element_size()
