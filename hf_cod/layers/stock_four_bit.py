"""bitsandbytes' own 4-bit layers on a CPU: prevents the repacking of their weights, or undoes it.

On CPUs with AVX512-BF16 the first forward pass in eval mode repacks a `Linear4bit` in place (bitsandbytes 0.50): codes
are reordered, scales transposed and rounded to bfloat16. Inference uses the new order. Backward passes, decoding and
saving do not: they give wrong gradients, weights and files, without an error. bitsandbytes' own function that undoes
the repacking leaves the scales of layers without double quantization transposed.

The layers are recognized by the attribute that enables repacking, so that bitsandbytes is imported only if a layer is
repacked and bitsandbytes has been imported already. This package's own 4-bit layers never repack.
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
NESTED_BLOCK = 256  # number of scales that share a scale in bitsandbytes


def keep_unpacked(model: nn.Module) -> None:
    """Disables repacking permanently, and undoes earlier repacking, for models that are trained or saved.

    Codes are restored bit-equal, and so are scales that are bfloat16 numbers, as those of bfloat16 weights. Other
    scales (float32 or float16 weights, double quantization) remain rounded, by up to 0.4 % each, with a warning.

    Raises:
        ValueError: a repacked layer in a form that cannot be undone.
    """
    rounded = sum(_unpack(name, module) for name, module in _layers(model))
    for _, module in _layers(model):
        setattr(module, SWITCH, False)
    if rounded:
        logger.warning(
            "%d 4-bit matrices were repacked by bitsandbytes when the model ran in eval mode: undone, but their scales "
            "remain rounded to bfloat16; load the model again for its exact weights",
            rounded,
        )


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Restores switches, and bit-equal weights that are repacked or unpacked within the block, at its end.

    While the block runs, a repacked weight takes memory in addition to the original one.
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
    """Disables repacking within the block, for measurements, which must not change the model."""
    with as_found(model):
        for _, module in _layers(model):
            setattr(module, SWITCH, False)
        yield


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within the block weights are in the order of checkpoints, so that they can be read. They are restored at its end.

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
    """Two-dimensional scales are transposed ones, also after bitsandbytes' own function has restored the codes."""
    return getattr(state, "packing_format_for_cpu", False) or getattr(getattr(state, "absmax", None), "ndim", 1) == 2


@torch.no_grad()
def _unpack(name: str, module: Any) -> bool:
    """Undoes one layer's repacking; returns whether its scales remain rounded."""
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

        # With the original offset most codes of the scales are the same as before.
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
    else:
        state.absmax = scales
    state.nested, state.dtype, state.packing_format_for_cpu = nested, dtype, False
    module.weight.data = codes
    return nested or dtype != torch.bfloat16


def _codes(name: str, codes: Tensor, state: Any) -> Tensor:
    """The codes in the order of checkpoints, computed by bitsandbytes."""
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as undo
    except ImportError as error:
        raise _unknown(name, "a repacked one that this version of bitsandbytes cannot undo") from error
    aside = copy.copy(state)
    aside.original_nested = False  # scales are handled in _unpack
    return undo(codes, aside)[0]


def _unknown(name: str, got: str) -> ValueError:
    return ValueError(
        f"model: expected 4-bit weights as they were loaded, got {got} in {name}; load the model again, and train or "
        "save it before it runs in eval mode"
    )
