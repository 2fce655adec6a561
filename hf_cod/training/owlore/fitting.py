"""Settings of OwLore that depend on the model: defaults that fit it, and checks."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from hf_cod.io.settings import Default
from hf_cod.training.owlore.active_layers import ActiveLayers
from hf_cod.training.owlore.settings import OwLoreSettings

logger = logging.getLogger(__name__)


def fitted(settings: OwLoreSettings, layers: ActiveLayers) -> OwLoreSettings:
    """The settings with defaults that fit the model: no more layers than can train, no rank above their width.

    What a user gave stays, and is refused elsewhere where it does not fit. All numbers are plain ones, which a
    checkpoint can hold.
    """
    widest = None if layers.other_adapters else max(_widths(layers), default=None)
    most = {"n_active": sum(map(bool, layers.layers)), "rank": widest}
    reasons = {"n_active": "as many layers can train", "rank": "the width of the layers' matrices"}
    plain: dict[str, Any] = {}
    for name, bound in most.items():
        value = getattr(settings, name)
        if value is None:
            continue
        plain[name] = int(value)
        if isinstance(value, Default) and bound is not None and value > bound:
            plain[name] = bound
            logger.warning("%s: %d instead of the default %d: %s", name, bound, value, reasons[name])
    return replace(settings, **plain)


def _widths(layers: ActiveLayers) -> list[int]:
    return [min(p.shape[-2:]) for parameters in layers.layers for p in parameters if p.ndim >= 2]


def check_rank(rank: int | None, layers: ActiveLayers) -> None:
    """Raises ValueError if a rank does not fit the trainable parameters."""
    if rank is not None and layers.other_adapters:
        raise ValueError(f"rank: expected None with LoRA adapters, whose matrices are of low rank already, got {rank}")
    widths = _widths(layers)
    if rank is not None and widths and rank > max(widths):
        raise ValueError(f"rank: expected at most {max(widths)}, the width of the layers' matrices, got {rank}")


def ranks(layers: ActiveLayers, rank: int | None) -> dict[int, int | None]:
    """Id of each parameter of the layers -> the rank to which its gradient is projected, if it is wider.

    Biases of experts, (experts, out), are no matrix and get none: a basis of their gradient would hold only the experts
    that had tokens.
    """
    found = (m.bias for index in range(len(layers.stack)) for m in layers.stack.expert_matrices(index))
    biases = {id(bias) for bias in found if bias is not None}
    return {id(p): None if id(p) in biases else rank for parameters in layers.layers for p in parameters}
