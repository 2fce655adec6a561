"""The value of `Linear3bit.weight`: packed bytes, on which arithmetic raises an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_shown: Any = WeakTensorKeyDictionary()


def _refuse(self: Any, other: Any) -> Any:
    raise ValueError(
        "weight: expected no arithmetic with codes in three bits, got some (a merge of adapters, or DoRA); load the "
        "adapters on the model after model.dequantize(), and call hf_cod.quantize on the merged model"
    )


class Codes(nn.Parameter):
    """A view of a parameter's bytes that raises an error where PEFT adds a matrix to it or to a clone of it.

    It is not the parameter itself: torch.compile passes only plain parameters to operators.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __add__ = __iadd__ = _refuse
    _is_hf_initialized = True  # so that transformers does not initialize it

    def __new__(cls, codes: Tensor) -> Codes:
        """A view."""
        return Tensor._make_subclass(cls, codes.detach(), False)

    @property
    def data(self) -> Codes:
        """The object itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse(self, value)

    def clone(self, **options: Any) -> Codes:
        """A copy of the same class, which raises the same error."""
        return Codes(super().clone(**options))


def shown(planes: Tensor) -> Codes:
    """The view of a parameter, always the same object: transformers identifies tensors by their identity."""
    known = _shown.get(planes)
    if known is None or known.device != planes.device or known.data_ptr() != planes.data_ptr():
        known = _shown[planes] = Codes(planes)
    return known
