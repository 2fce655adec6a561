"""bitsandbytes' own 4-bit layers on a CPU: keeps them from repacking their weights, or undoes it.

On processors with AVX512-BF16 the first forward pass in eval mode repacks a `Linear4bit` in place (bitsandbytes 0.50):
codes in another order, scales transposed and rounded to bfloat16. Inference knows the new order. Backward passes,
decoding and saving do not: they give wrong gradients, weights and files, without an error. bitsandbytes' own way back
leaves the scales of layers without double quantization transposed.

The layers are known by the attribute that switches repacking on, so that bitsandbytes is imported only where a layer is
repacked, and so has been imported already. This package's own 4-bit layers never repack.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SWITCH = "support_avx512bf16_for_cpu"
NESTED_BLOCK = 256  # scales that share a scale, as bitsandbytes fixes it


def keep_unpacked(model: nn.Module) -> None:
    """Switches repacking off for good, and undoes it where it has happened: for what is trained or saved.

    Codes come back bit-equal. So do scales that are bfloat16 numbers, as those of bfloat16 weights are; others (float32
    or float16 weights, double quantization) stay rounded, up to 0.4 % each, which a warning says.

    Raises:
        ValueError: a repacked layer in a form that cannot be undone.
    """
    rounded = sum(_unpack(name, module) for name, module in _layers(model))
    for _, module in _layers(model):
        setattr(module, SWITCH, False)
    if rounded:
        logger.warning(
            "%d 4-bit matrices were repacked by bitsandbytes when the model ran in eval mode: undone, but their scales "
            "stay rounded to bfloat16; load the model again for its exact weights",
            rounded,
        )


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Switches, and weights that are repacked or unpacked within the block, come back bit-equal behind it.

    While the block runs, a repacked weight needs memory beside the one that it was made of.
    """
    before = [(module, getattr(module, SWITCH), *_parts(module)) for _, module in _layers(model)]
    fields = [None if state is None else dict(vars(state)) for *_, state in before]
    packed = [_is_repacked(state) for *_, state in before]
    try:
        yield
    finally:
        for (module, switch, codes, state), values, was in zip(before, fields, packed, strict=True):
            setattr(module, SWITCH, switch)
            if values is not None and _is_repacked(state) != was:
                module.weight.data = codes
                vars(state).clear()
                vars(state).update(values)


@contextmanager
def without_repacking(model: nn.Module) -> Iterator[None]:
    """Nothing is repacked within the block: for measuring, which must leave the model as it was."""
    with as_found(model):
        for _, module in _layers(model):
            setattr(module, SWITCH, False)
        yield


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within the block weights stand in the order of checkpoints: for reading them. They come back as they were.

    Raises:
        ValueError: a repacked layer in a form that cannot be undone.
    """
    with without_repacking(model):
        for name, module in _layers(model):
            _unpack(name, module)
        yield


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, SWITCH)]


def _parts(module: Any) -> tuple[Tensor, Any]:
    """Codes and their QuantState; None for weights that are not quantized (yet)."""
    return module.weight.data, getattr(module.weight, "quant_state", None)


def _is_repacked(state: Any) -> bool:
    """Scales of two dimensions are transposed ones, also where bitsandbytes' way back has restored the codes."""
    return getattr(state, "packing_format_for_cpu", False) or getattr(getattr(state, "absmax", None), "ndim", 1) == 2


@torch.no_grad()
def _unpack(name: str, module: Any) -> bool:
    """Undoes one layer's repacking; whether its scales stay rounded."""
    codes, state = _parts(module)
    if not _is_repacked(state):
        return False
    rows, columns = state.shape
    if tuple(state.absmax.shape) != (columns // state.blocksize, rows):
        raise _unknown(name, f"scales of shape {tuple(state.absmax.shape)}")
    scales = state.absmax.T.float().reshape(-1).contiguous()
    repacked = bool(getattr(state, "packing_format_for_cpu", False))
    dtype = state.original_dtype if repacked else state.dtype
    nested = bool(repacked and state.original_nested)
    if repacked:
        codes = _codes(name, codes, state)
    if nested:
        from bitsandbytes.functional import quantize_blockwise

        # With the offset that they had, most codes of scales are the same again.
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
    else:
        state.absmax = scales
    state.nested, state.dtype, state.packing_format_for_cpu = nested, dtype, False
    module.weight.data = codes
    return nested or dtype != torch.bfloat16


def _codes(name: str, codes: Tensor, state: Any) -> Tensor:
    """The codes in the order of checkpoints, by bitsandbytes, whose order it is."""
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as undo
    except ImportError as error:
        raise _unknown(name, "a repacked one that this version of bitsandbytes cannot undo") from error
    aside = copy.copy(state)
    aside.original_nested = False  # the scales are no business of it
    return undo(codes, aside)[0]


def _unknown(name: str, got: str) -> ValueError:
    return ValueError(
        f"model: expected 4-bit weights as they were loaded, got {got} in {name}; load the model again, and train or "
        "save it before it runs in eval mode"
    )
