"""Layers that use the keys and values of an earlier layer, which the config counts from the end (Gemma 3n and 4).

The last `num_kv_shared_layers` layers have no keys and values of their own: each uses those of the last layer of its
type (full or sliding attention) before them.
"""

from __future__ import annotations

from typing import Any

from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.stack import DecoderLayers

# Attribute of an attention module that hands on its keys and values.
_HANDS_ON = "store_full_length_kv"
SHARING_MODES = "kv_sharing_modes"  # list by layer that the config computes
REUSE, STORE = "reuse", "store"


def sharing_modes(config: Any) -> list[str | None] | None:
    """How each layer takes part: "reuse", "store" or None; None for a config that says nothing about it."""
    if getattr(config, "num_kv_shared_layers", None) is None:
        return None
    modes = getattr(config, SHARING_MODES, None)
    return None if modes is None else [*modes]


def check_sources(config: Any, kept: list[int]) -> None:
    """Checks that the layer whose keys and values a kept layer uses is kept.

    Raises:
        ValueError: it is not; says which layers can be removed.
    """
    modes = sharing_modes(config)
    if modes is None:
        return
    users: dict[int, list[int]] = {}
    for layer in (index for index in range(len(modes)) if modes[index] == REUSE):
        kind = config.layer_types[layer]
        sources = [i for i, mode in enumerate(modes) if mode != REUSE and config.layer_types[i] == kind]
        if sources:
            users.setdefault(sources[-1], []).append(layer)
    for source in sorted(users.keys() - {*kept}):
        left = [layer for layer in users[source] if layer in kept]
        if left:
            raise ValueError(
                f"layers: expected to keep layer {source}, whose keys and values layers {left} use, got it removed; "
                f"remove these as well, or any layers but {sorted(users)}"
            )


def mend_sharing(stack: DecoderLayers, kept: list[int], before: list[str | None], changes: Changes) -> None:
    """Makes the kept layers hand on keys and values as the changed config says.

    Args:
        stack: the kept layers.
        kept: their old indices.
        before: the earlier `sharing_modes`.
        changes: records what is changed.

    Raises:
        ValueError: the config describes other layers as those that use the keys and values of others.
    """
    now = sharing_modes(stack.config) or []
    wanted = [before[old] == REUSE for old in kept]
    if [mode == REUSE for mode in now] != wanted:
        raise ValueError(f"layers: expected a config by which layers share keys and values as before, got {now}")
    for layer, mode in zip(stack, now, strict=True):
        for module in layer.modules():
            if _HANDS_ON in vars(module):
                changes.set(module, _HANDS_ON, mode == STORE)
