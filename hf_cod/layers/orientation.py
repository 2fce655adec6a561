"""The orientation in which a matrix is stored: nn.Linear as (out, in), GPT-2's Conv1D as (in, out).

All other files use these functions and work on (out, in). Only `models/shapes.py` has the distinction again, because it
is copied to the Hub.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_plain(module: nn.Module | None) -> bool:
    """Whether this is exactly a Linear or a Conv1D; subclasses may store their weight in another form."""
    return type(module) in (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a Linear, a Conv1D or a subclass of them."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether a matrix, or each matrix of a bank of experts, is stored as (in, out)."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a matrix, quantized ones included."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


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
