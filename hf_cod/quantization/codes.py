"""The weight of a Linear3bit: bytes that nobody must take for numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _refuse(self: Any, other: Any) -> Any:
    raise ValueError(
        "weight: expected no arithmetic with codes in three bits, got some (a merge of adapters? DoRA?); call "
        "model.dequantize() first, and hf_cod.quantize afterwards"
    )


class _Bytes(Tensor):
    """What `Codes.data` is: a merge of adapters adds to it, or to a clone of it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __add__ = __iadd__ = _refuse

    def clone(self, **options: Any) -> _Bytes:  # type: ignore[override]
        return super().clone(**options).as_subclass(_Bytes)


class Codes(nn.Parameter):
    """A parameter of bytes, which says so where PEFT would add a matrix to it."""

    __add__ = __iadd__ = _refuse

    def __new__(cls, codes: Tensor) -> Codes:
        """Never learns."""
        return Tensor._make_subclass(cls, codes.detach().as_subclass(Tensor), False)

    @property
    def data(self) -> Tensor:
        return self.detach().as_subclass(_Bytes)

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value.as_subclass(Tensor))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        return memo.setdefault(id(self), Codes(self.detach().clone()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Codes, (self.detach().as_subclass(Tensor),)
