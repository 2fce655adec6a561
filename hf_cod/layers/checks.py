"""Checks before a model is changed or a file is used on it: writable weights, zeros to keep, sizes, positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.stack import DecoderLayers

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_writable(stack: DecoderLayers) -> None:
    """Makes sure, before anything is changed, that each matrix can be pruned in place.

    Raises:
        ValueError: adapters, quantized, offloaded or sharded weights; a weight that two matrices share (or a matrix
            and an embedding); NaN or infinity. Says in which module.
    """
    names = _names_of_weights(stack.model)
    for index in range(len(stack)):
        adapter = next((n for n, m in stack[index].named_modules() if hasattr(m, "base_layer")), None)
        if adapter is not None:
            raise ValueError(
                f"model: expected plain weights, got an adapter at {stack.layers_path}.{index}.{adapter}; "
                "merge_and_unload it first, or prune the model below it"
            )
        for name, weight in _parameters(stack, index):
            _check_plain(name, weight)
            shared = [other for other in names[id(weight)] if other != names[id(weight)][0]]
            if shared:
                raise ValueError(
                    f"model: expected weights of one matrix each, got {names[id(weight)][0]}, which is {shared[0]}, too"
                )
            if not weight.isfinite().all():
                raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")


def _parameters(stack: DecoderLayers, index: int) -> Iterator[tuple[str, Any]]:
    for name, module in stack.linears(index).items():
        yield name, getattr(module, "weight", None)
    for name, bank in stack.experts(index).items():
        yield from ((f"{name}.{key}", p) for key, p in bank.named_parameters(recurse=False) if p.dim() == 3)


def _check_plain(name: str, weight: Any) -> None:
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        kind = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        raise ValueError(f"model: expected plain floating-point weights, got {kind} in {name}; prune before quantizing")
    if weight.device.type == "meta":
        raise ValueError(f"model: expected weights in memory, got offloaded ones in {name}; load the model whole")


def _names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


# Share of zeros from which on a matrix counts as pruned: a few are there by chance, of weights that were rounded.
LEAST_SHARE = 0.01


def is_pruned(weight: Tensor) -> bool:
    """Whether at least `LEAST_SHARE` of the entries is 0."""
    return int((weight == 0).sum()) >= LEAST_SHARE * weight.numel()


def pruned_matrices(stack: DecoderLayers) -> list[nn.Parameter]:
    """Weights of the layers' matrices, banks of experts included, that are pruned."""
    found = [p for layer in stack for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()]
    return [p for p in found if is_pruned(p)]


logger = logging.getLogger(__name__)


def check_sizes(field: str, model: str, sizes: Sequence[int] | None, stack: DecoderLayers) -> None:
    """Makes sure that what was found on a model with layers of those sizes is used on one with the same.

    Args:
        field: what was found; messages begin with it.
        model: the name of the model that it was found on; where only that differs, a warning says so.
        sizes: weights in the matrices of each of its layers; None: not known, so that all pass.
        stack: the layers that it is used on.

    Raises:
        ValueError: another number of layers, or a layer with another number of weights.
    """
    if sizes is None:
        return
    expected = sizes_of(stack)
    if len(sizes) != len(expected):
        raise ValueError(f"{field}: expected those of a model with {len(expected)} layers, got {len(sizes)} ({model})")
    wrong = [index for index, size in enumerate(sizes) if size != expected[index]]
    if wrong:
        raise ValueError(
            f"{field}: expected those of a model with {expected[wrong[0]]} weights in layer {wrong[0]}, got one with "
            f"{sizes[wrong[0]]} ({model})"
        )
    warn_of_other_name(field, model, stack)


def sizes_of(stack: DecoderLayers) -> list[int]:
    """By what scores and plans know a model: weights in the matrices of each of its layers."""
    return [stack.count_weights(index) for index in range(len(stack))]


def name_of(stack: DecoderLayers) -> str:
    """What scores and plans call a model: where it was loaded from, or its class."""
    config = getattr(stack.model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(stack.model).__name__)


def other_name(field: str, model: str, stack: DecoderLayers) -> list[str]:
    """A sentence where the names differ, but for the directories before them: a model may have moved; else none."""
    mine = name_of(stack)
    if model.rstrip("/").rpartition("/")[2] == mine.rstrip("/").rpartition("/")[2]:
        return []
    return [f"{field}: used on {mine}, but found on {model}, whose layers are as large"]


def warn_of_other_name(field: str, model: str, stack: DecoderLayers) -> None:
    """Warns where the names differ; see `other_name`."""
    for told in other_name(field, model, stack):
        logger.warning("%s", told)


# Names of embeddings of learnt positions: GPT-2's, OPT's and BERT's kinds. Rotary ones have no such table and no limit.
_TABLES = ("wpe", "embed_positions", "position_embeddings")


def learnt_positions(model: nn.Module) -> tuple[int, str] | None:
    """(How many positions a model has learnt, the name of their table); None where there is no limit."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT's table has two rows in front of the first position, RoBERTa's those up to its padding.
            offset = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset, name
    return None


def check_length(model: nn.Module, length: int) -> None:
    """Makes sure that samples of `length` tokens fit a model whose positions are learnt.

    Raises:
        ValueError: they are longer than its table of positions; says how long they may be.
    """
    found = learnt_positions(model)
    if found is not None and length > found[0]:
        raise ValueError(
            f"sequence_length: expected at most {found[0]} tokens, for which {found[1]} has positions, got {length}"
        )
