"""Parameters of experts in another format than numbers, which models use as they use the parameter.

The forward pass of a bank of experts multiplies tokens by views of a parameter (experts, rows, columns): by one matrix
at a time, by all of them with the ends of each expert's rows (`grouped_mm`), by one matrix for each token
(`batched_mm`), or by all matrices at once (`bmm`). A module of the class below stands in the place of the parameter,
under its name. Its views carry out these products expert by expert, for experts that tokens were routed to. Neither the
class of the bank nor the function by which transformers runs it is replaced, so no list of models is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class ExpertParameter(nn.Module):
    """Stands in the place of a parameter that holds one matrix of each expert.

    Subclasses hold the tensors. Their `forward` returns these, so that hooks of accelerate load offloaded ones.

    Args:
        shape: of the parameter as the model stores it: (experts, rows, columns), or (experts x rows, columns).
        experts: their number.
        transposed: whether the matrix of an expert is stored as (in, out).
        place: its number among the parameters of the module that holds it.
        dtype: of the parameter. It follows casts of the model.
    """

    _is_hf_initialized = True  # so that transformers does not initialize it

    def __init__(self, shape: torch.Size, experts: int, transposed: bool, place: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.experts, self.transposed, self.place, self.dtype = shape, experts, transposed, place, dtype

    def product(self, tensors: Any, x: Tensor, expert: int) -> Tensor:
        """x (n, in) times W^T of one expert: (n, out) in x's dtype.

        Args:
            tensors: what `forward` returned.
            x: the tokens.
            expert: its number.
        """
        raise NotImplementedError

    def grouped_product(self, tensors: Any, x: Tensor, ends: Tensor) -> Tensor | None:
        """All products of `ExpertView.grouped` at once; None, as here, if there is no kernel for them."""
        return None

    def decoded(self, tensors: Any, expert: int, dtype: torch.dtype) -> Tensor:
        """W (out, in) of one expert, as a new tensor. For the arguments see `product`."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """W (out, in) of each expert as new dense tensors, in float32 if no dtype is given."""
        tensors = self()
        return (self.decoded(tensors, expert, dtype or torch.float32) for expert in range(self.experts))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of each expert."""
        rows, columns = self._stored
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def _stored(self) -> tuple[int, int]:
        """(rows, columns) of an expert, as the model stores it."""
        return self.shape[-2] // (self.experts if len(self.shape) == 2 else 1), self.shape[-1]

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return next(self.parameters()).device

    @property
    def is_meta(self) -> bool:
        """Whether it has no data."""
        return self.device.type == "meta"

    def dim(self) -> int:
        """Number of dimensions of the parameter."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ExpertView:
        return self._view()[index]

    def transpose(self, first: int, second: int) -> ExpertView:
        """As of the parameter."""
        return self._view().transpose(first, second)

    def view(self, *shape: Any) -> ExpertView:
        """(experts x rows, columns) as (experts, rows, columns).

        Raises:
            ValueError: another shape.
        """
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        full = (self.experts, *self._stored)
        if len(wanted) != 3 or any(n not in (-1, size) for n, size in zip(wanted, full, strict=True)):
            raise ValueError(f"experts: expected a view as {full} of packed matrices, got {wanted}")
        return ExpertView(self, None, False)

    def _view(self) -> ExpertView:
        return self.view(-1, *self._stored)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = [arg._view() if isinstance(arg, ExpertParameter) else arg for arg in args]
        return ExpertView.__torch_function__(func, types, whole, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertParameter:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


def parameters_of(module: nn.Module) -> list[tuple[str, Any]]:
    """(key, parameter) of those that a module holds itself, packed ones in their places."""
    found: list[tuple[str, Any]] = [*module.named_parameters(recurse=False)]
    packed = [(key, child) for key, child in module.named_children() if isinstance(child, ExpertParameter)]
    for key, child in sorted(packed, key=lambda one: one[1].place):
        found.insert(child.place, (key, child))
    return found


class ExpertView:
    """One, several or all matrices of an `ExpertParameter`, turned or not, as the factor of a product.

    Args:
        parameter: the parameter.
        chosen: the expert; an index (n,) of experts, which may repeat; None: all of them.
        turned: whether rows and columns are exchanged, compared with how the model stores them.
    """

    def __init__(self, parameter: ExpertParameter, chosen: int | Tensor | None, turned: bool) -> None:
        self.parameter, self.chosen, self.turned = parameter, chosen, turned
        rows, columns = parameter._stored
        matrix = (columns, rows) if turned else (rows, columns)
        several = parameter.experts if chosen is None else len(chosen) if isinstance(chosen, Tensor) else None
        self.shape = torch.Size(matrix if several is None else (several, *matrix))

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameter."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """That of the parameter."""
        return self.parameter.device

    def dim(self) -> int:
        """2 or 3."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ExpertView:
        if self.chosen is not None:
            raise ValueError(f"experts: expected an index of experts, got one into the matrices of {self.chosen}")
        several = isinstance(index, Tensor) and index.dim() == 1
        return ExpertView(self.parameter, index if several else range(len(self))[int(index)], self.turned)

    @property
    def mT(self) -> ExpertView:
        """Turned."""
        return ExpertView(self.parameter, self.chosen, not self.turned)

    T = mT

    def t(self) -> ExpertView:
        """Turned."""
        return self.mT

    def transpose(self, first: int, second: int) -> ExpertView:
        """Turned.

        Raises:
            ValueError: an exchange of other dimensions than rows and columns.
        """
        if {first % self.dim(), second % self.dim()} != {self.dim() - 2, self.dim() - 1}:
            raise ValueError(f"experts: expected rows and columns to be exchanged, got {first} and {second}")
        return self.mT

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix of one expert as numbers.

        Raises:
            ValueError: several experts, of which only one is decoded at a time.
        """
        if not isinstance(self.chosen, int):
            raise ValueError("experts: expected products with packed matrices, got another use of all of them")
        W = self.parameter.decoded(self.parameter(), self.chosen, dtype)
        return W.mT if self._is_in_out else W

    @property
    def _is_in_out(self) -> bool:
        return self.parameter.transposed != self.turned

    def times(self, x: Tensor) -> Tensor:
        """x M: (..., r) for one matrix M (r, c), (b, n, r) for b of them."""
        if isinstance(self.chosen, int):
            return self._one(self.parameter(), x, self.chosen)
        if isinstance(self.chosen, Tensor):
            return self._gathered(x, self.chosen)
        return torch.stack([self._used(x[expert], expert) for expert in range(len(self))])

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (n, r), sorted by expert, times the matrix of each row's expert: (n, c).

        Args:
            x: the tokens; those after the last end belong to no expert, and get zeros.
            ends: (experts,), the index after the last row of each expert.
        """
        tensors = self.parameter()
        whole = self.parameter.grouped_product(tensors, x, ends) if self._is_in_out else None
        if whole is not None:
            return whole
        places = _places(ends, len(x))
        parts = [self._one(tensors, x[place], expert) for expert, place in places]
        rest = len(x) - (places[-1][1].stop if places else 0)
        return torch.cat([*parts, x.new_zeros(rest, self.shape[-1])])

    def _gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (b, n, r) times the matrix of expert `chosen` (b,) each."""
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.parameter.experts)
        rows = x[order].flatten(0, 1)
        found = ExpertView(self.parameter, None, self.turned).grouped(rows, counts.cumsum(0) * x.shape[1])
        return found.view(*x.shape[:2], -1)[order.argsort()]

    def _used(self, x: Tensor, expert: int) -> Tensor:
        """x (n, r) times one matrix. Tokens that are routed to others are zeros (Llama 4), and stay zeros; they have a
        gradient all the same.
        """
        if (x.requires_grad and torch.is_grad_enabled()) or x.is_meta:
            return self._one(self.parameter(), x, expert)
        rows = x.any(-1).nonzero().flatten()
        out = x.new_zeros(*x.shape[:-1], self.shape[-1])
        if len(rows):
            out[rows] = self._one(self.parameter(), x[rows], expert)
        return out

    def _one(self, tensors: Any, x: Tensor, expert: int) -> Tensor:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.shape[-1])
        if self._is_in_out:
            return self.parameter.product(tensors, x, expert)
        return x @ self.parameter.decoded(tensors, expert, x.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = [*args], dict(kwargs or {})
        args = [arg._view() if isinstance(arg, ExpertParameter) else arg for arg in args]
        product = _PRODUCTS.get(str(getattr(func, "__name__", "")))
        if product is not None:
            return product(*args, **kwargs)
        dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor)), None)
        return func(*(arg.dense(dtype or arg.dtype) if isinstance(arg, cls) else arg for arg in args), **kwargs)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    out = weight.mT.times(x)
    return out if bias is None else out + bias


def _matmul(x: Any, other: Any) -> Tensor:
    return x.mT.times(other.mT).mT if isinstance(x, ExpertView) else other.times(x)


def _grouped_mm(x: Tensor, weight: ExpertView, offs: Tensor, **_: Any) -> Tensor:
    return weight.grouped(x, offs)


def _places(ends: Tensor, rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) of each expert with rows. On the meta device, without numbers, all have equally many."""
    stops = [rows * (e + 1) // len(ends) for e in range(len(ends))] if ends.is_meta else ends.tolist()
    found, start = [], 0
    for expert, stop in enumerate(stops):
        if stop > start:
            found.append((expert, slice(start, stop)))
            start = stop
    return found


# Name of a function of torch -> the product. "grouped_mm_fallback" is that of transformers, for older GPUs.
_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "__matmul__"], _matmul),
    **dict.fromkeys(["grouped_mm", "_grouped_mm", "grouped_mm_fallback"], _grouped_mm),
}
