"""Naive ways to remove and to merge experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from hf_cod import find_decoder_layers


@contextmanager
def masked(model, removed: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """The whole model, with logits of -inf for these experts in its routers, and in biases of the choice."""
    stack = find_decoder_layers(model)
    sets = {one.name: one for index in range(len(stack)) for one in stack.expert_sets(index)}
    routers, biases, linear = {}, [], functional.linear
    for name, experts in removed.items():
        router = sets[name].router
        routers[getattr(router.module, router.key).data_ptr()] = [*experts]
        bias = getattr(router.module, "e_score_correction_bias", None)
        if bias is not None:
            biases.append((bias, bias.clone()))
            bias.data[[*experts]] = -torch.inf

    def with_mask(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if weight.data_ptr() in routers:
            out = out.clone()
            out[..., routers[weight.data_ptr()]] = -torch.inf
        return out

    functional.linear = with_mask
    try:
        yield
    finally:
        functional.linear = linear
        for bias, before in biases:
            bias.data.copy_(before)


def merged(experts: Sequence[Tensor], kept: Sequence[int], tokens: Sequence[int]) -> list[Tensor]:
    """Flattened experts -> the kept ones, each the mean by tokens with those that are most similar to it."""
    members = {keeper: [keeper] for keeper in kept}
    for e, flat in enumerate(experts):
        if e not in kept:
            cosines = [float(functional.cosine_similarity(flat.double(), experts[k].double(), dim=0)) for k in kept]
            members[kept[cosines.index(max(cosines))]].append(e)
    found = []
    for keeper in kept:
        total = sum(tokens[e] for e in members[keeper])
        mean = sum(tokens[e] * experts[e].double() for e in members[keeper]) / max(1, total)
        found.append(mean if total else experts[keeper].double())
    return found
