"""Inputs of the experts of a mixture, if a model stores them as one bank of 3-D parameters.

For torch such a bank is one module, so hooks see neither the expert of a token nor the inputs of the second matrix.
transformers can run a model's experts by a registered function. The function here computes expert by expert and reports
their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_cod.layers.orientation import is_transposed

Observe = Callable[[str, int, Tensor, Tensor], None]
"""(matrix's name, expert, its inputs (n, in), the indices (n,) of their tokens in the batch)."""

IMPLEMENTATION = "hf_cod_observed"


@contextmanager
def observed(banks: Mapping[str, nn.Module], observe: Observe) -> Iterator[None]:
    """Within the block, each forward of a bank calls `observe` before each product of an expert that received tokens.

    Args:
        banks: name -> bank, from `DecoderLayers.experts`.
        observe: see `Observe`; a matrix is named after its parameter ("...mlp.experts.down_proj").

    Raises:
        ValueError: a bank with its own code, for which no function can be registered.
    """
    for name, bank in banks.items():
        if not hasattr(bank, "_apply_gate"):
            raise ValueError(
                f"model: expected experts that run by transformers' experts interface, got {type(bank).__name__} "
                f"({name})"
            )
    names = {id(bank): name for name, bank in banks.items()}

    def forward(bank: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def observe_one(key: str, expert: int, x: Tensor, tokens: Tensor) -> None:
            observe(f"{names[id(bank)]}.{key}", expert, x, tokens)

        return _run(bank, hidden_states, top_k_index, top_k_weights, observe_one)

    configs: list[Any] = list({id(bank.config): bank.config for bank in banks.values()}.values())
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


def _run(bank: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, observe: Observe) -> Tensor:
    """The function of the bank, expert by expert: sum_k w_k down_e(act(up_e(x))) over each token's experts e.

    Args:
        bank: the bank of experts.
        hidden_states: (N, d), N tokens.
        top_k_index, top_k_weights: (N, k), the experts of each token and their weights.
        observe: as `Observe`, with the parameter's name only.

    Returns:
        (N, d).
    """
    first = "gate_up_proj" if bank.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in range(bank.num_experts):
        tokens, place = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        x = hidden_states[tokens]
        observe(first, expert, x, tokens)
        x = _product(bank, first, expert, x)
        x = bank._apply_gate(x) if bank.has_gate else bank.act_fn(x)
        observe("down_proj", expert, x, tokens)
        x = _product(bank, "down_proj", expert, x)
        if bank.has_post_expert_norm:
            x = bank.post_expert_norm(x)
        total.index_add_(0, tokens, (x * top_k_weights[tokens, place, None]).to(total.dtype))
    return total.to(hidden_states.dtype)


def _product(bank: Any, key: str, expert: int, x: Tensor) -> Tensor:
    W = getattr(bank, key)[expert]
    b = getattr(bank, f"{key}_bias")[expert] if bank.has_bias else None
    return nn.functional.linear(x, W.mT if is_transposed(bank) else W, b)
