"""What `Linear3bit.weight` shows: bytes that nobody must take for numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_shown: Any = WeakTensorKeyDictionary()


def _refuse(self: Any, other: Any) -> Any:
    raise ValueError(
        "weight: expected no arithmetic with codes in three bits, got some (a merge of adapters? DoRA?); put the "
        "adapters on what model.dequantize() gives, and hf_cod.quantize the result"
    )


class Codes(nn.Parameter):
    """The bytes of a parameter which, where PEFT would add a matrix to it or to a clone of it, says so.

    Not the parameter itself: torch.compile hands only plain ones to operators.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __add__ = __iadd__ = _refuse
    _is_hf_initialized = True  # no random numbers, transformers

    def __new__(cls, codes: Tensor) -> Codes:
        """A view."""
        return Tensor._make_subclass(cls, codes.detach(), False)

    @property
    def data(self) -> Codes:
        """Itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse(self, value)

    def clone(self, **options: Any) -> Codes:
        """A copy, as careful."""
        return Codes(super().clone(**options))


def shown(planes: Tensor) -> Codes:
    """The same object for the same parameter: transformers tells tensors by their identity."""
    known = _shown.get(planes)
    if known is None or known.device != planes.device or known.data_ptr() != planes.data_ptr():
        known = _shown[planes] = Codes(planes)
    return known
