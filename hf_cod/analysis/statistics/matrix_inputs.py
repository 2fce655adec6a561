"""Inputs of each matrix of chosen layers while the model runs: tokens without padding; for experts, routed tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hf_cod.layers.direct_use import has_tokens_first
from hf_cod.layers.expert_routing import observed_experts
from hf_cod.layers.running import are_tokens_first
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stacks import DECODER
from hf_cod.layers.watched_weights import version_of

Read = Callable[[str, "int | None", "Tensor | None", str], None]
"""(matrix's name, expert or None, its inputs (n, in), its own name). If a matrix has the same input tensor as the one
before it: (name, None, None, that matrix's name), so that query, key and value share one sum."""


class MatrixInputs:
    """Hooks that call `read` before each product of a matrix.

    Call `start` before each forward pass, within `attached`.

    Args:
        stack: the layers.
        layers: indices of the layers to read.
        read: see `Read`.

    Of a layer that runs several times in a forward pass, the inputs of all its runs are read.

    Raises:
        ValueError: a module shared by two of the layers.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int], read: Read) -> None:
        self._layers = [*layers]
        self._linears = _own_linears(stack, self._layers)
        self._read, self._stack, self._excluded = read, stack, stack.excluded
        self.start({})

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Adds the hooks to the modules, and removes them at the end of the block."""
        with ExitStack() as attachments:
            if self._stack.name == DECODER:
                encoder: Any = self._stack.model.get_encoder()  # type: ignore[operator]
                attachments.callback(encoder.register_forward_hook(self._keep_encoded).remove)
            attachments.enter_context(observed_experts(self._stack, self._layers, self._read_expert))
            for name, module in self._linears.items():
                handle = module.register_forward_pre_hook(self._hook_of(name), with_kwargs=True)
                attachments.callback(handle.remove)
            yield

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Starts a batch with the inputs of the model, whose masks (S, T) say which tokens are padding."""
        self._mask = padding_of(self._stack.mask(inputs))
        # The cross-attention of a decoder reads the tokens of the encoder.
        self._encoded_mask = padding_of(self._stack.encoded_mask(inputs)) if self._stack.name == DECODER else None
        shapes = [mask.shape for mask in (self._mask, self._encoded_mask) if mask is not None]
        self._square = any(has_tokens_first(self._stack, samples, tokens) for samples, tokens in shapes)
        self._encoded: Any = None
        self._last: tuple[Any, int, str] | None = None  # input, its version, the matrix that read it

    def _keep_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoded = weakref.ref(output[0])

    def _hook_of(self, name: str) -> Any:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is not None and self._last[0]() is x and self._last[1] == version_of(x):
                self._read(name, None, None, self._last[2])
                return
            self._read(name, None, self._real_rows(name, x), name)
            self._last = (weakref.ref(x), version_of(x), name)

        return read

    def _read_expert(self, name: str, expert: int, x: Tensor, tokens: Tensor | None) -> None:
        if name in self._excluded:
            return
        if self._mask is not None and tokens is not None:
            x = x[self._mask.flatten().to(x.device)[tokens]]
        elif self._mask is not None:  # the tokens are not known, unless these are all of them
            x = self._real_rows(name, x)
        self._read(name, expert, x, name)

    def _real_rows(self, name: str, x: Tensor) -> Tensor:
        encoded = self._encoded is not None and self._encoded() is x
        return real_rows(
            x.detach(), self._encoded_mask if encoded else self._mask, self._square, f"the input of {name}"
        )


def real_rows(x: Tensor, mask: Tensor | None, square: bool, place: str) -> Tensor:
    """(n, width): the vectors of x (S, T, width), or (T, S, width), at tokens that are no padding.

    Args:
        x: vectors of each token, or of each head for each token (S, heads, T, width) or (S, T, heads, width). Codes
            of all distances of tokens, (1, 2 T - 1, width), have no padding.
        mask: (S, T), from `padding_of`.
        square: see `has_tokens_first`.
        place: what x is, for the error.

    Raises:
        ValueError: x has another number of tokens than the mask, because the model adds or drops some.
    """
    rows = x.flatten(0, -2)
    if mask is None:
        return rows
    samples, tokens = mask.shape
    if len(x) == 1 and len(rows) == 2 * tokens - 1:
        return rows  # distances of tokens, from -(T - 1) to T - 1
    if x.dim() == 4 and x.shape[0] == samples and tokens in x.shape[1:3]:  # vectors of each head
        mask = mask[:, None] if x.shape[2] == tokens else mask[..., None]
        mask = mask.expand(x.shape[:3]).flatten()
    else:
        mask = (mask.mT if are_tokens_first(x.shape, samples, tokens, square) else mask).flatten()
    if len(rows) != len(mask):
        raise ValueError(
            f"attention_mask: expected {len(rows)} tokens as at {place}, got {len(mask)}; use samples without padding"
        )
    return rows[mask.to(rows.device)]


def padding_of(mask: Tensor | None) -> Tensor | None:
    """(S, T): 1 for real tokens; None without padding, where a gather is avoided."""
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected (samples, tokens) with 0 for padding, got shape {tuple(mask.shape)}, from "
            "which padding cannot be derived"
        )
    return None if mask is None or bool(mask.all()) else mask.bool()


def check_finite_input(sums: Tensor, name: str, number: int) -> None:
    """Checks that the inputs of a matrix are finite.

    Raises:
        ValueError: they are not; names the matrix and the batch.
    """
    if not sums.isfinite().all():
        raise ValueError(
            f"activations: expected finite numbers, got NaN or infinity first at the input of {name}, batch {number}"
        )


def _own_linears(stack: DecoderLayers, layers: Iterable[int]) -> dict[str, nn.Module]:
    """All Linears; raises for a module or a bank of experts in two layers, whose statistics would be mixed."""
    linears: dict[str, nn.Module] = {}
    owner: dict[int, int] = {}
    for index in layers:
        here = stack.linears(index)
        for name, module in [*here.items(), *((m.bank, m.module) for m in stack.expert_matrices(index))]:
            other = owner.setdefault(id(module), index)
            if other != index:
                raise ValueError(f"model: expected modules of one layer each, got {name} also in layer {other}")
        linears.update(here)
    return linears
