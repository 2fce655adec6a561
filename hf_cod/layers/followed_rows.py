"""Follows the rows of tensors through the functions by which models sort and repeat the tokens of their experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hf_cod.layers.experts import ExpertSet


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of the n rows of a tensor (..., d).

    Attributes:
        tokens: (n,), the indices of their tokens in the batch; None: unknown.
        weights: (n,), factors that the rows were multiplied by; None: none.
        parts: (experts, expert, number of rows) of each expert that they are outputs of, in order.
    """

    tokens: Tensor | None
    weights: Tensor | None = None
    parts: tuple[tuple[ExpertSet, int, int], ...] = ()

    def at(self, index: Any) -> Rows:
        """Some of the rows; whose outputs they are is not followed."""
        tokens, weights = (None if part is None else part[index] for part in (self.tokens, self.weights))
        return Rows(tokens, weights)


class FollowedRows(TorchFunctionMode):
    """A mode of torch that knows which tokens the rows of tensors are, and what they were multiplied by.

    Attributes:
        rows: tensor -> what is known of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Forgets all tensors."""
        self.rows: Any = WeakTensorKeyDictionary()

    def multiplied(self, out: Tensor, x: Tensor, W: Tensor, transposed: bool) -> None:
        """Called after each product x W^T, or x W if `transposed`."""

    def weighted(self, out: Tensor, rows: Rows, w: Tensor) -> None:
        """Called after known rows of `out` were multiplied by one factor each; w is (n,)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        follow = _FOLLOWED.get(getattr(func, "__name__", ""))
        if follow is not None:
            follow(self, out, *args, **{name: value for name, value in (kwargs or {}).items() if name != "out"})
        return out

    def _product(self, out: Any, x: Any, W: Any, *_: Any, **__: Any) -> None:
        self.multiplied(out, x, W, transposed=True)

    def _linear(self, out: Any, x: Any, weight: Any, *_: Any, **__: Any) -> None:
        self.multiplied(out, x, weight, transposed=False)

    def _item(self, out: Any, t: Any, index: Any) -> None:
        """Gathers rows, or takes a range of them."""
        inner = [one for one in index if one is not None] if isinstance(index, tuple) else [index]
        if t.dim() != 2 or len(inner) != 1 or not isinstance(out, Tensor) or out.dim() < 2:
            return
        (index,) = inner
        if isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
            tokens = index.nonzero().flatten() if index.dtype == torch.bool else index
            self.rows[out] = self.rows[t].at(tokens) if t in self.rows else Rows(tokens)
        elif isinstance(index, slice) and t in self.rows:
            self.rows[out] = self.rows[t].at(index)

    def _repeat(self, out: Any, t: Any, *sizes: Any) -> None:
        sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if t.dim() == 2 and len(sizes) == 2 and sizes[1] == 1:
            tokens = torch.arange(len(t), device=t.device)
            self.rows[out] = Rows(tokens.repeat(sizes[0]))

    def _same(self, out: Any, t: Any, *_: Any, **__: Any) -> None:
        """The same rows in another shape, with other numbers."""
        if not isinstance(t, Tensor) or t not in self.rows or not isinstance(out, Tensor):
            return
        if out.shape[-1] == t.shape[-1] and out.numel() == t.numel():
            self.rows[out] = self.rows[t]

    def _split(self, out: Any, t: Any, *_: Any, dim: int = 0, **__: Any) -> None:
        if t in self.rows and t.dim() == 2 and all(part.shape[1] == t.shape[1] for part in out):
            start = 0
            for part in out:
                self.rows[part] = self.rows[t].at(slice(start, start + len(part)))
                start += len(part)

    def _cat(self, out: Any, tensors: Any, dim: int = 0, **_: Any) -> None:
        found = [self.rows.get(t) for t in tensors if len(t)]
        if dim != 0 or out.dim() != 2 or not found or any(rows is None or not rows.parts for rows in found):
            return
        tokens = None if any(rows.tokens is None for rows in found) else torch.cat([rows.tokens for rows in found])
        self.rows[out] = Rows(tokens, None, tuple(part for rows in found for part in rows.parts))

    def _times(self, out: Any, a: Any, b: Any, *_: Any, **__: Any) -> None:
        """A product with one factor for each row, as with gate weights."""
        for x, w in ((a, b), (b, a)):
            if not isinstance(x, Tensor) or x not in self.rows:
                continue
            n = x.numel() // max(1, x.shape[-1])
            if isinstance(w, Tensor) and w.dim() == x.dim() and w.shape[-1] == 1 and w.numel() == n:
                self.weighted(out, self.rows[x], w.flatten())
                self.rows[out] = Rows(self.rows[x].tokens, w.flatten())
            elif not isinstance(w, Tensor) or w.dim() == 0:
                self._same(out, x)
            return

    def _plus(self, out: Any, a: Any, b: Any, *_: Any, **__: Any) -> None:
        """A sum with one vector for all rows, as with a bias."""
        if isinstance(b, Tensor) and b.dim() == 1:
            self._same(out, a)


# Name of a function of torch -> what follows its rows.
_FOLLOWED: dict[str, Callable[..., None]] = {
    **dict.fromkeys(["matmul", "__matmul__", "mm", "bmm"], FollowedRows._product),
    **dict.fromkeys(["view", "reshape", "to", "float", "type", "type_as", "contiguous"], FollowedRows._same),
    **dict.fromkeys(["mul", "__mul__", "__rmul__", "multiply"], FollowedRows._times),
    **dict.fromkeys(["add", "__add__"], FollowedRows._plus),
    "linear": FollowedRows._linear,
    "__getitem__": FollowedRows._item,
    "repeat": FollowedRows._repeat,
    "split": FollowedRows._split,
    "cat": FollowedRows._cat,
}
