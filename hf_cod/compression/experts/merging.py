"""Merges experts: which of the kept ones is most similar, and the mean of the weights by usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_cod.layers.experts import ExpertSet
from hf_cod.layers.removal.expert_cuts import Mixing

# Number of weights that are compared at once.
AT_ONCE = 2**24


def most_similar(experts: ExpertSet, kept: Sequence[int]) -> dict[int, int]:
    """Removed expert -> the kept one with the largest cosine similarity of all weights; of equals the first one."""
    products = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    for matrix in experts.matrices:
        rows, columns = matrix.shape
        step = max(1, AT_ONCE // (columns * experts.count))
        for start in range(0, rows, step):
            parts = [matrix.read(e)[start : start + step].detach().float().flatten() for e in range(experts.count)]
            W = torch.stack(parts)  # (experts, some of their weights)
            products += (W @ W.T).double().cpu()
    norms = products.diagonal().clamp(min=torch.finfo(products.dtype).tiny).sqrt()
    cosines = (products / norms / norms[:, None])[:, [*kept]]
    return {e: kept[int(cosines[e].argmax())] for e in range(experts.count) if e not in kept}


def mixing(kept: Sequence[int], into: Mapping[int, int], tokens: Sequence[int]) -> Mixing:
    """The mean of a kept expert and of those that are merged into it, weighted by their numbers of tokens.

    Args:
        kept: the kept experts.
        into: removed expert -> kept expert.
        tokens: number of tokens of each expert; if no token was routed to any of those that are merged, the kept one
            stays as it is.
    """
    shares: list[dict[int, float]] = []
    for keeper in kept:
        members = [keeper, *(e for e, place in into.items() if place == keeper)]
        total = sum(tokens[e] for e in members)
        shares.append({e: tokens[e] / total for e in members if tokens[e]} if total else {keeper: 1.0})
    return partial(_mix, shares)


def _mix(shares: Sequence[Mapping[int, float]], blocks: Tensor) -> Tensor:
    """(experts, ...) -> (kept, ...): row i is the sum of share times block over `shares[i]`, in float32."""
    mixed = blocks.new_empty(len(shares), *blocks.shape[1:])
    for i, parts in enumerate(shares):
        if len(parts) == 1:
            mixed[i] = blocks[next(iter(parts))]
            continue
        total = torch.zeros(
            blocks.shape[1:], dtype=torch.promote_types(blocks.dtype, torch.float32), device=blocks.device
        )
        for e, share in parts.items():
            total.add_(blocks[e].to(total.dtype), alpha=share)
        mixed[i] = total.to(blocks.dtype)
    return mixed
