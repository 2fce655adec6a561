"""The orientation in which a matrix is stored: nn.Linear as (out, in), GPT-2's Conv1D as (in, out).

All other files use these functions and work on (out, in). Only `models/shapes.py` has the distinction again, because it
is copied to the Hub.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Shapes without the last axis, and the size of the values: a forward may look at either.
_INPUTS = (((5,), 1), ((1, 1), 1), ((2, 40), 1), ((40,), 100), ((2, 3), 100))
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(module: nn.Module | None) -> bool:
    """Whether this is a Linear or a Conv1D, or a subclass that computes the same: measured, not known by name.

    Subclasses may store their weight in another form, return more than the product, or change their input.
    """
    if module is None or type(module) in (nn.Linear, Conv1D):
        return module is not None
    return _is_dense(module) and _computes_alike(module)


def computes_otherwise(module: nn.Module) -> bool:
    """Whether this is a subclass of Linear or Conv1D with a dense weight whose output is not the product, such as a
    router that returns its choice as well, or a matrix that is applied by groups.
    """
    return _is_dense(module) and not is_plain(module)


def _is_dense(module: nn.Module) -> bool:
    """Whether a Linear or Conv1D has a floating-point weight, perhaps a bias, and nothing else."""
    weight = module._parameters.get("weight") if is_linear(module) else None
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES or weight.dim() != 2:
        return False
    return not [*module.children()] and not [*module.buffers()] and module._parameters.keys() <= {"weight", "bias"}


def _computes_alike(module: nn.Module) -> bool:
    """Whether a small copy of the module, with random weights, returns x W^T + b for each of `_INPUTS`."""
    small: Any = copy.copy(module)  # shares the attributes that its forward may read, such as a factor
    generator = torch.Generator().manual_seed(0)
    rows, columns = 12, 8  # few, and divisible by most numbers of groups
    W, b = (torch.randn(*shape, generator=generator, device="cpu") for shape in ((rows, columns), (rows,)))
    set_shape(small, rows, columns)
    bias = None if module._parameters.get("bias") is None else nn.Parameter(b)
    small._parameters = {"weight": nn.Parameter(turned(module, W).contiguous()), "bias": bias}
    with torch.no_grad(), torch.device("cpu"):
        for shape, largest in _INPUTS:
            x = largest * torch.randn(*shape, columns, generator=generator)
            expected = nn.functional.linear(x, W, bias)
            try:
                got = type(small).forward(small, x.clone())
            except Exception:  # whatever a forward raises that expects another shape
                return False
            if not isinstance(got, Tensor) or got.shape != expected.shape:
                return False
            if not torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * largest):
                return False
    return True


def multiplies(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Whether the forward of a Linear, or of a subclass of it, is the product with its weight, plus its bias."""
    if not args or not isinstance(output, Tensor) or getattr(module, "weight", None) is None:
        return False
    with torch.no_grad():
        W = turned(module, module.weight)
        if args[0].shape[-1] != W.shape[1]:
            return False
        expected = nn.functional.linear(args[0], W, module.bias)
        return expected.shape == output.shape and torch.allclose(output, expected, rtol=1e-3, atol=1e-4)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a Linear, a Conv1D or a subclass of them."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether a matrix, or each matrix of a bank of experts, is stored as (in, out)."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a matrix, quantized ones included."""
    out, width = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    return int(out), int(width)  # a model may have computed them with tensors (Inkling's vision tower)


def set_shape(module: Any, out: int, width: int) -> None:
    """Sets (out, in) of a Linear or Conv1D whose weight was replaced."""
    if isinstance(module, Conv1D):
        module.nf, module.nx = out, width
    else:
        module.out_features, module.in_features = out, width


def turned(module: nn.Module, W: Tensor) -> Tensor:
    """A view of the module's weight as (out, in), or the reverse: of (out, in) as the module stores it.

    Also for each matrix of a bank of experts (experts, out, in).
    """
    return W.mT if is_transposed(module) else W


def new_matrix(W: Tensor, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """A Linear (a Conv1D if `transposed`) with the frozen weight W (out, in) and the given bias, not a copy of it."""
    made: Any = Conv1D(1, 1) if transposed else nn.Linear(1, 1, bias=False, device="meta")
    set_shape(made, *W.shape)
    made.weight = nn.Parameter(turned(made, W).contiguous(), requires_grad=False)
    made.bias = bias
    return made
