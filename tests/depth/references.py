"""Removals and maps as one would write them down: whole models, explicit matrices."""

from __future__ import annotations

import copy
import math
from itertools import combinations

import torch

from hf_cod.decoder_layers import find_decoder_layers
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


def linear_map(model, removed, matrix, batches, damping):
    """T of one run of removed layers, the first that are removed: min || y + M T - z ||^2 + lam || T - I ||^2 by lstsq
    on stacked rows [M; sqrt(lam) I] D = [z - x; 0].
    """
    M, R = [], []
    last, first = max(removed), min(removed)
    for batch in batches:
        states = hidden_states(model, batch)
        found = []
        handle = model.get_submodule(matrix).register_forward_hook(lambda m, args, out, kept=found: kept.append(out))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        added = found[0].view(*states[0].shape).double()
        M.append(real_tokens(added, batch.get("attention_mask")))
        R.append(real_tokens(states[last + 1] - states[first], batch.get("attention_mask")))
    M, R = torch.cat(M), torch.cat(R)
    lam = damping * (M.T @ M).diagonal().mean()
    eye = torch.eye(M.shape[1], dtype=M.dtype)
    stacked = torch.cat([M, lam.sqrt() * eye]), torch.cat([R, torch.zeros_like(eye)])
    return torch.linalg.lstsq(*stacked).solution + eye


def with_map(model, matrix, T):
    """A copy whose matrix hands its output on times T."""
    model = copy.deepcopy(model)
    model.get_submodule(matrix).register_forward_hook(
        lambda m, args, out: (out.double() @ T.to(torch.float64)).to(out.dtype)
    )
    return model


def path_of(model, layer, name):
    """The full name of a module of a layer."""
    return f"{find_decoder_layers(model).path}.{layer}.{name}"
