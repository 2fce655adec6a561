"""Quantized modules of a loaded model: whether they are whole, and what they are as dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.layers.orientation import new_matrix


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of this package."""
    return isinstance(module, nn.Linear) and hasattr(module, "scales") and hasattr(module, "bits")


def loaded_module(model: Any, name: str) -> Any:
    """A quantized module.

    Raises:
        ValueError: a bank of experts that the checkpoint lacks.
    """
    parent, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(parent), key)
    if isinstance(found, Tensor):
        raise ValueError(f"{name}: expected it in the checkpoint, got none")
    return found


def to_linear(module: Any, dtype: torch.dtype | None) -> nn.Module:
    """A dense Linear, or Conv1D, with the decoded weights; the bias is shared."""
    return new_matrix(module.unpack(dtype), module.bias, module.was_transposed).train(module.training)


def to_parameter(module: QuantizedExperts, dtype: torch.dtype | None) -> nn.Parameter:
    """A dense parameter of the shape that the model stores, with the decoded weights; decoded expert by expert."""
    whole = torch.empty(module.shape, dtype=dtype or torch.float32, device=module.device)
    matrices = whole.view(module.experts, -1, whole.shape[-1])
    for W, place in zip(module.unpack(whole.dtype), matrices, strict=True):
        place.copy_(W.mT if module.transposed else W)
    return nn.Parameter(whole, requires_grad=False)


def check_stored(module: Any, name: str) -> None:
    """Checks that a module's tensors were loaded and that its scales are finite. Shapes are checked by transformers,
    and each code is valid.

    Raises:
        ValueError: a missing tensor, one of another dtype, NaN or infinity; begins with the module's name.
    """
    for key, tensor in module.named_parameters():
        # Transformers marks loaded tensors; a tensor that the checkpoint lacks is unmarked, with undefined contents.
        if key != "bias" and tensor.device.type != "meta" and not hasattr(tensor, "_is_hf_initialized"):
            raise ValueError(f"{name}.{key}: expected it in the checkpoint, got none; the file is damaged")
    whole = module.scales.double_quant
    expected = {"weight": torch.uint8, "scales.absmax": torch.uint8 if whole else torch.float32}
    for key, tensor in module.named_parameters():
        if key == "bias" or tensor.device.type == "meta":
            continue
        wanted = expected.get(key, torch.float32)
        if tensor.dtype != wanted:
            raise ValueError(f"{name}.{key}: expected {wanted}, got {tensor.dtype}; the file is damaged")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}.{key}: expected finite numbers, got NaN or infinity; the file is damaged")


def check_range(module: Any, name: str, dtype: torch.dtype) -> None:
    """Checks that decoded weights are finite in the compute dtype.

    Raises:
        ValueError: the dtype is float16, and a scale exceeds its largest number.
    """
    if dtype != torch.float16 or module.scales.absmax.device.type == "meta":
        return
    from hf_cod.compression.quantization.bnb_decoding import dequantize_scales

    scales = [module.scales()]
    if isinstance(module, QuantizedExperts):
        tensors = module()
        scales = [module.matrix_of(tensors, expert)[1] for expert in range(module.experts)]
    largest = max(float(dequantize_scales(*each).abs().max()) for each in scales)
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"dtype: expected one that holds weights of {largest:g} in {name}, got {dtype}; use bfloat16")
