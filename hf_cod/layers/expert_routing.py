"""Observes what each token was routed to: inputs of the experts' matrices, gate weights, norms of the experts' outputs.

For torch a bank of experts is one module, so hooks see neither the expert of a token nor the inputs of its matrices.
transformers can run most banks by a registered function. The function here computes expert by expert and reports what
enters and leaves them. Banks with code of their own, and lists of experts, are observed by `expert_products.py`, which
reports the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_cod.layers.expert_products import Enters, Leaves, Routed, watched_products
from hf_cod.layers.experts import ExpertMatrix, ExpertSet
from hf_cod.layers.stack import DecoderLayers

IMPLEMENTATION = "hf_cod_observed"


@dataclass(frozen=True)
class _Bank:
    """A bank that runs by the interface: its experts, and the place of each of its parameters."""

    experts: ExpertSet
    matrices: dict[str, ExpertMatrix]


@contextmanager
def observed_experts(
    stack: DecoderLayers, layers: Iterable[int], enters: Enters | None = None, leaves: Leaves | None = None
) -> Iterator[None]:
    """Within the block, `enters` is called before each product of a matrix of a bank that tokens were routed to, and
    `leaves` after each expert that they were routed to.

    Args:
        stack: the layers.
        layers: indices of those to observe.
        enters: see `Enters`. Matrices of lists of experts are Linears, at whose inputs hooks are enough.
        leaves: see `Leaves`.

    Raises:
        ValueError: at the end of the block, a bank that ran, but not by products with views of its parameters.
    """
    banks: dict[int, _Bank] = {}
    with ExitStack() as block:
        for index in layers:
            others: list[ExpertSet] = []
            for experts in stack.expert_sets(index):
                if leaves is None and {matrix.name for matrix in experts.banked} <= stack.excluded:
                    continue  # excluded, or a list
                module = experts.banked[0].module if len(experts.places) == 1 and experts.banked else None
                if module is None or not runs_by_interface(module):
                    others.append(experts)
                else:
                    banks[id(module)] = _Bank(experts, {matrix.key: matrix for matrix in experts.banked})
            if others:
                block.enter_context(watched_products(stack[index], others, enters, leaves))
        if banks:
            block.enter_context(_observed_by_interface([*banks.values()], enters, leaves))
        yield


def runs_by_interface(bank: nn.Module) -> bool:
    """Whether transformers runs a bank by the function that its config names."""
    return all(hasattr(bank, name) for name in ("_apply_gate", "has_gate", "has_bias", "config"))


@contextmanager
def _observed_by_interface(banks: Sequence[_Bank], enters: Enters | None, leaves: Leaves | None) -> Iterator[None]:
    known = {id(next(iter(bank.matrices.values())).module): bank for bank in banks}

    def forward(bank: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run(bank, known.get(id(bank)), (hidden_states, top_k_index, top_k_weights), enters, leaves)

    modules: list[Any] = [next(iter(bank.matrices.values())).module for bank in banks]
    configs: list[Any] = list({id(module.config): module.config for module in modules}.values())
    before = [config._experts_implementation for config in configs]
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = forward
    try:
        for config in configs:
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation
        del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]


def _run(
    bank: Any,
    known: _Bank | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    enters: Enters | None,
    leaves: Leaves | None,
) -> Tensor:
    """The function of the bank, expert by expert: sum_k w_k down_e(act(up_e(x))) over each token's experts e.

    Args:
        bank: the bank of experts.
        known: what to report of it; None: nothing.
        inputs: (N, d), N tokens; (N, k), the experts of each token; (N, k), their weights.
        enters, leaves: see `observed_experts`.

    Returns:
        (N, d).
    """
    hidden_states, top_k_index, top_k_weights = inputs
    first = "gate_up_proj" if bank.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in range(bank.num_experts):
        tokens, place = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        x = hidden_states[tokens]
        x = _product(bank, known, first, expert, x, tokens, enters)
        x = bank._apply_gate(x) if bank.has_gate else bank.act_fn(x)
        x = _product(bank, known, "down_proj", expert, x, tokens, enters)
        if bank.has_post_expert_norm:
            x = bank.post_expert_norm(x)
        weights = top_k_weights[tokens, place]
        x = x * weights[:, None]
        if known is not None and leaves is not None:
            leaves(Routed(known.experts, expert, tokens, weights, x))
        total.index_add_(0, tokens, x.to(total.dtype))
    return total.to(hidden_states.dtype)


def _product(
    bank: Any, known: _Bank | None, key: str, expert: int, x: Tensor, tokens: Tensor, enters: Enters | None
) -> Tensor:
    if known is not None and enters is not None:
        enters(known.matrices[key].name, expert, x, tokens)
    W = getattr(bank, key)[expert]
    b = getattr(bank, f"{key}_bias")[expert] if bank.has_bias else None
    transposed = getattr(bank, "is_transposed", False)
    return nn.functional.linear(x, W.mT if transposed else W, b)
