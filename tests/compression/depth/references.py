"""Removals and maps as one would write them down: whole models, explicit matrices."""

from __future__ import annotations

import copy
import math
from itertools import combinations

import torch

from tests.references import hidden_states, perplexity, real_tokens, without_layer


def loss_without(model, removed, batches):
    """Nats a token over all batches (of equal numbers of tokens), by the whole model with each layer handing on."""
    for layer in removed:
        model = without_layer(model, layer)
    return sum(math.log(perplexity(model, batch)) for batch in batches) / len(batches)


def best_removal(model, count, allowed, batches):
    """Of all sets of `count` layers the one without which the loss is least."""
    losses = {removed: loss_without(model, removed, batches) for removed in combinations(allowed, count)}
    return list(min(losses, key=losses.get)), losses


def linear_map(intact, shortened, block, matrix, batches, damping):
    """T of a run of removed layers: min || y + M T - z ||^2 + lam || T - I ||^2 by lstsq on stacked rows
    [M; sqrt(lam) I] D = [z - x; 0]; z of the intact model, all else of the shortened one.
    """
    M, R = [], []
    for batch in batches:
        wanted = hidden_states(intact, batch)[max(block) + 1]
        found = []
        handle = shortened.get_submodule(matrix).register_forward_hook(
            lambda m, args, out, kept=found: kept.append(out)
        )
        x = hidden_states(shortened, batch)[min(block)]
        handle.remove()
        mask = batch.get("attention_mask")
        M.append(real_tokens(found[0].view(x.shape).double(), mask))
        R.append(real_tokens(wanted - x, mask))
    M, R = torch.cat(M), torch.cat(R)
    lam = damping * (M.T @ M).diagonal().mean()
    eye = torch.eye(M.shape[1], dtype=M.dtype)
    stacked = torch.cat([M, lam.sqrt() * eye]), torch.cat([R, torch.zeros_like(eye)])
    return torch.linalg.lstsq(*stacked).solution + eye


def with_map(model, matrix, T):
    """A copy whose matrix hands its output on times T."""
    model = copy.deepcopy(model)
    model.get_submodule(matrix).register_forward_hook(lambda m, args, out: out @ T.to(out))
    return model
