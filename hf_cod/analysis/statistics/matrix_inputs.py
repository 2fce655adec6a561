"""What enters each matrix of chosen layers while the model runs: tokens without padding, of experts those routed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hf_cod.analysis.statistics.expert_banks import observed
from hf_cod.layers.stack import DecoderLayers

Read = Callable[[str, "int | None", "Tensor | None", str], None]
"""(matrix's name, expert or None, its inputs (n, in), its own name); or, where a matrix reads the very tensor that
another one has just read, (name, None, None, that other one's name): query, key and value need no three sums."""


class MatrixInputs:
    """Hooks that call `read` before each product of a matrix.

    Call `start` before each forward pass, within `attached`.

    Args:
        stack: the layers.
        layers: which of them.
        read: see `Read`.

    Raises:
        ValueError: a module that two of the layers share.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int], read: Read) -> None:
        self._linears, self._banks = _own_modules(stack, layers)
        self._read = read
        self.start(None)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Puts the hooks on the modules, and takes them away at the end."""
        with ExitStack() as attachments:
            if self._banks:
                attachments.enter_context(observed(self._banks, self._read_expert))
            for name, module in self._linears.items():
                handle = module.register_forward_pre_hook(self._hook_of(name), with_kwargs=True)
                attachments.callback(handle.remove)
            yield

    def start(self, mask: Tensor | None) -> None:
        """Begins a batch with its attention mask (S, T), or None."""
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask: expected (samples, tokens), 0 where there is padding, got shape {tuple(mask.shape)}, "
                "which does not say which tokens are padding"
            )
        # A full mask costs a gather for nothing.
        self._mask = None if mask is None or bool(mask.all()) else mask.bool().flatten()
        self._last: tuple[Any, str] | None = None

    def _hook_of(self, name: str) -> Any:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is not None and self._last[0]() is x:
                self._read(name, None, None, self._last[1])
                return
            self._read(name, None, self._real_rows(name, x.detach().flatten(0, -2)), name)
            self._last = (weakref.ref(x), name)

        return read

    def _read_expert(self, name: str, expert: int, x: Tensor, tokens: Tensor) -> None:
        rows = x if self._mask is None else x[self._mask.to(x.device)[tokens]]
        self._read(name, expert, rows, name)

    def _real_rows(self, name: str, rows: Tensor) -> Tensor:
        if self._mask is None:
            return rows
        if len(rows) != len(self._mask):
            raise ValueError(
                f"attention_mask: expected {len(rows)} tokens as at the input of {name}, got {len(self._mask)}; "
                "use samples without padding"
            )
        return rows[self._mask.to(rows.device)]


def check_finite_input(sums: Tensor, name: str, number: int) -> None:
    """Makes sure that what entered a matrix was finite.

    Raises:
        ValueError: it was not; names the matrix and the batch.
    """
    if not sums.isfinite().all():
        raise ValueError(
            f"activations: expected finite numbers, got NaN or infinity first at the input of {name}, batch {number}"
        )


def _own_modules(stack: DecoderLayers, layers: Iterable[int]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """All Linears and all banks of experts; a module in two layers would have no statistics of its own."""
    linears: dict[str, nn.Module] = {}
    banks: dict[str, nn.Module] = {}
    owner: dict[int, int] = {}
    for index in layers:
        for kind, found in ((linears, stack.linears(index)), (banks, stack.experts(index))):
            for name, module in found.items():
                other = owner.setdefault(id(module), index)
                if other != index:
                    raise ValueError(f"model: expected modules of one layer each, got {name} in layer {other}, too")
            kind.update(found)
    return linears, banks
