"""The one place that knows which way round a matrix is stored: nn.Linear as (out, in), GPT-2's Conv1D as (in, out).

Everybody else asks here and works on (out, in). `models/shapes.py` alone knows it once more: it travels to the Hub.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_plain(module: nn.Module | None) -> bool:
    """Whether this is a Linear or a Conv1D itself, and no subclass, which may hold its weight in another form."""
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
    """Notes another (out, in) in a Linear or Conv1D whose weight was replaced."""
    if isinstance(module, Conv1D):
        module.nf, module.nx = out, width
    else:
        module.out_features, module.in_features = out, width


def turned(module: nn.Module, W: Tensor) -> Tensor:
    """A view of the module's weight as (out, in), or of (out, in) as the module stores it: one is the other's way back.

    Also of each matrix of a bank of experts (experts, out, in).
    """
    return W.mT if is_transposed(module) else W


def new_matrix(W: Tensor, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """A Linear, or transposed a Conv1D, with the weight W (out, in), which does not train, and the bias itself."""
    made: Any = Conv1D(1, 1) if transposed else nn.Linear(1, 1, bias=False, device="meta")
    set_shape(made, *W.shape)
    made.weight = nn.Parameter(turned(made, W).contiguous(), requires_grad=False)
    made.bias = bias
    return made
