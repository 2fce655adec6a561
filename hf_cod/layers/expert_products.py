"""Observes experts that run by code of their own, by the products of tokens with views of their parameters.

Within the forward pass of a layer a mode of torch sees each function. A product is one of an expert if its second
factor is a view of the parameter of a bank: the place of the view says which expert it is, and its strides say whether
it is turned. The tokens of a row are followed through the few functions by which models sort and repeat rows, and so is
a factor for each row, such as a gate weight:

- Llama 4 repeats all tokens for each expert, multiplies the inputs by the gate weights, which are 0 for tokens that are
  routed to others, and runs all experts at once;
- JetMoe sorts the tokens by expert, splits them, and multiplies the outputs by the gate weights;
- DBRX, and most other banks, gather the tokens of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.experts import ExpertMatrix, ExpertSet
from hf_cod.layers.followed_rows import FollowedRows, Rows
from hf_cod.models.expert_parameters import ExpertParameter, ExpertView

Enters = Callable[[str, int, Tensor, "Tensor | None"], None]
"""(matrix's name, expert, its inputs (n, in), the indices (n,) of their tokens in the batch or None if unknown)."""


@dataclass(frozen=True, eq=False)
class Routed:
    """What left an expert.

    Attributes:
        experts: the experts that it is one of.
        expert: its number.
        tokens: (n,), the indices of its tokens in the batch; None if they cannot be followed.
        weights: (n,), their gate weights; None if the model applies none to single rows.
        outputs: (n, d), what the expert adds to the sum over experts: gate weights are applied.
    """

    experts: ExpertSet
    expert: int
    tokens: Tensor | None
    weights: Tensor | None
    outputs: Tensor


Leaves = Callable[[Routed], None]


@contextmanager
def watched_products(
    layer: nn.Module, sets: Sequence[ExpertSet], enters: Enters | None, leaves: Leaves | None
) -> Iterator[None]:
    """Within the block, each forward pass of the layer is observed; see `observed_experts`.

    Raises:
        ValueError: at the end of the block, a bank that ran unseen.
    """
    mode = _Products(sets, enters, leaves)
    handles = [
        layer.register_forward_pre_hook(lambda *_: mode.start()),
        layer.register_forward_hook(lambda *_: mode.stop(), always_call=True),
        layer.register_forward_hook(lambda *_: mode.finish()),
    ]
    for experts in sets:
        for bank in {id(matrix.module): matrix for matrix in experts.banked}.values():
            handles.append(bank.module.register_forward_pre_hook(mode.runs(bank)))
        for number, module in enumerate(experts.modules):
            handles.append(module.register_forward_hook(mode.expert_hook(experts, number), with_kwargs=True))
    try:
        yield
        mode.check_seen()
    finally:
        mode.stop()
        for handle in handles:
            handle.remove()


class _Products(FollowedRows):
    """The mode of one layer.

    Args:
        sets: the experts that are watched.
        enters, leaves: see `observed_experts`.
    """

    def __init__(self, sets: Sequence[ExpertSet], enters: Enters | None, leaves: Leaves | None) -> None:
        super().__init__()
        self._watched = [(experts, matrix) for experts in sets for matrix in experts.banked]
        # Parameter -> its bank, of those with experts that have no weights: a router may choose none of the others.
        partial = [experts.banked for experts in sets if len({matrix.experts for matrix in experts.banked}) > 1]
        self._partial = {id(matrix.parameter): id(matrix.module) for banked in partial for matrix in banked}
        self._used: set[int] = set()
        self._enters, self._leaves = enters, leaves
        self._on = False
        self._ran: dict[int, ExpertMatrix] = {}
        self._seen: set[int] = set()
        self.forget()

    def start(self) -> None:
        """Begins a forward pass of the layer."""
        self.forget()
        self._on = True
        self.__enter__()

    def stop(self) -> None:
        """Ends it, also on an exception."""
        if self._on:
            self._on = False
            self.__exit__(None, None, None)

    def finish(self) -> None:
        """Reports the experts whose outputs were not multiplied by gate weights, after `stop`."""
        for experts, expert, tokens, outputs in [*self._pending.values()]:
            self._report(Routed(experts, expert, tokens, None, outputs))
        self.forget()

    def runs(self, bank: ExpertMatrix) -> Callable[..., None]:
        """A forward pre-hook of a bank."""

        def note(*_: Any) -> None:
            self._ran[id(bank.module)] = bank

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()) if self._partial else ():
            if id(value) in self._partial:
                self._used.add(self._partial[id(value)])
        return super().__torch_function__(func, types, args, kwargs)

    def expert_hook(self, experts: ExpertSet, expert: int) -> Callable[..., None]:
        """A forward hook of a module that is one expert of a list."""

        def read(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(output, Tensor) and output.numel():
                rows = self.rows.get(x, Rows(None))
                self._left(experts, output, [(expert, rows, output.numel() // output.shape[-1])])

        return read

    def check_seen(self) -> None:
        """Checks that products of each bank that ran were seen. A bank some of whose experts have no weights may run
        without any, and then uses none of its parameters.

        Raises:
            ValueError: they were not.
        """
        idle = {*self._partial.values()} - self._used
        for key, bank in self._ran.items():
            if key not in self._seen and key not in idle:
                raise ValueError(
                    f"model: expected experts that multiply tokens by views of their parameters, got "
                    f"{type(bank.module).__name__} ({bank.bank}), whose inputs cannot be observed"
                )

    def forget(self) -> None:
        """Forgets all tensors."""
        super().forget()
        self._known: dict[tuple[int, int], tuple[int, Rows]] = {}
        self._pending: dict[tuple[int, int], tuple[ExpertSet, int, Tensor | None, Tensor]] = {}

    def _report(self, routed: Routed) -> None:
        self._pending.pop((id(routed.experts), routed.expert), None)
        if self._leaves is not None:
            self._leaves(routed)

    def weighted(self, out: Tensor, rows: Rows, w: Tensor) -> None:
        flat, start = out.flatten(0, -2), 0
        for experts, expert, n in rows.parts:
            place = slice(start, start + n)
            tokens = None if rows.tokens is None else rows.tokens[place]
            self._report(Routed(experts, expert, tokens, w[place], flat[place]))
            start += n

    def multiplied(self, out: Any, x: Any, W: Any, transposed: bool) -> None:
        found = self._matrix_of(W)
        if found is None or (found[2] is None and (x.dim() != 3 or len(x) != len(W))):
            return
        experts, matrix, expert, turned = found
        if (turned != transposed) != matrix.transposed:
            raise ValueError(
                f"model: expected {'turned' if matrix.transposed else 'plain'} matrices in {matrix.name}, judged by "
                "their shapes, got the reverse; experts of this class are not supported"
            )
        self._seen.add(id(matrix.module))
        numbers, inputs = (range(len(x)), [*x]) if expert is None else ([expert], [x.flatten(0, -2)])
        known, last = self.rows.get(x, Rows(None)), matrix is experts.banked[-1]
        entered, start = [], 0
        for number, one in zip(numbers, inputs, strict=True):
            own = known.at(slice(start, start + len(one)))
            start += len(one)
            entered.append((number, self._entered(experts, matrix, number, one, own, last), len(one)))
        if last:
            self._left(experts, out, entered)

    def _entered(self, experts: ExpertSet, matrix: ExpertMatrix, expert: int, x: Tensor, own: Rows, last: bool) -> Rows:
        """Reports the inputs of a matrix; those of the last one are rows of the first, in the same order."""
        if not len(x):
            return own
        key = id(experts), expert
        n, before = self._known.get(key, (0, own))
        rows = before if n == len(x) and (last or own.tokens is None) else own
        self._known[key] = len(x), rows
        if self._enters is not None:
            routed = ... if rows.weights is None else rows.weights != 0
            tokens = None if rows.tokens is None else rows.tokens[routed]
            self._enters(matrix.name, expert, x[routed].detach(), tokens)
        return rows

    def _left(self, experts: ExpertSet, out: Tensor, entered: Sequence[tuple[int, Rows, int]]) -> None:
        """What leaves experts is reported, if their inputs were weighted, else followed until it is.

        Args:
            experts: the experts.
            out: their outputs.
            entered: (expert, its rows, their number) of each, in order.
        """
        flat, start, parts, tokens = out.flatten(0, -2), 0, [], []
        for expert, rows, n in entered:
            here = flat[start : start + n]
            start += n
            if rows.weights is not None:
                routed = rows.weights != 0
                at = None if rows.tokens is None else rows.tokens[routed]
                self._report(Routed(experts, expert, at, rows.weights[routed], here[routed]))
            elif n:
                self._pending[id(experts), expert] = experts, expert, rows.tokens, here
                parts.append((experts, expert, n))
                tokens.append(rows.tokens)
        if parts:
            known = [one for one in tokens if one is not None]
            self.rows[out] = Rows(torch.cat(known) if len(known) == len(parts) else None, None, tuple(parts))

    def _matrix_of(self, W: Any) -> tuple[ExpertSet, ExpertMatrix, int | None, bool] | None:
        """(experts, matrix, expert or None for all of them, whether it is turned) of a view of a parameter."""
        for experts, matrix in self._watched:
            found = matrix.place_of(W) if isinstance(W, (Tensor, ExpertParameter, ExpertView)) else None
            if found is not None:
                return experts, matrix, *found
        return None
