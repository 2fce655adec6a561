"""Config fields that name layers whose hidden states the model hands on: stages of a backbone, features for a text.

When such a layer is removed, the state after the kept layer before it takes its place, as if the removed one had
returned its input. When it runs several times, the state after the last time takes its place.
"""

from __future__ import annotations

from typing import Any

from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.wording import Wording, wording_of

# Fields that mean the state after a layer, counted from 0; a negative number is none.
LAYER_FIELDS = (
    "deepstack_visual_indexes",
    "intermediate_hidden_state_indices",
    "intermediate_layers_indices",
    "insert_layer_id",
)
# Fields of the config of a model around a vision tower that mean the state after a number of layers: 0 is that before
# the first one, and negative numbers count from the end.
FEATURE_FIELDS = ("vision_feature_layer",)


def mend_handed_on(config: Any, depth: int, kept: list[int], changes: Changes) -> None:
    """Changes the fields of the config of a stack so that they name the same states of a shorter one.

    Args:
        config: the config that counts the layers.
        depth: the number of layers before.
        kept: the layers that are left, by their old indices.
        changes: records what is changed.

    Raises:
        ValueError: two of the states would be the same one, or one would be that before the first layer.
    """
    _mend_layers(config, kept, changes)
    _mend_stages(config, depth, kept, changes)


def mend_features(config: Any, depth: int, kept: list[int], changes: Changes) -> None:
    """The same for the config of a model that reads hidden states of its vision tower, or has a copy of its fields."""
    _mend_layers(config, kept, changes)
    for name in FEATURE_FIELDS:
        found = []
        for state in _listed(config, name):
            left = _left_of(kept, state % (depth + 1))
            found.append(left if state >= 0 else left - len(kept) - 1)
        _mend(config, name, found, changes, wording_of(kept))


def _mend_layers(config: Any, kept: list[int], changes: Changes) -> None:
    for name in LAYER_FIELDS:
        found = [layer if layer < 0 else _left_of(kept, layer + 1) - 1 for layer in _listed(config, name)]
        _mend(config, name, found, changes, wording_of(kept))


def _left_of(kept: list[int], count: int) -> int:
    """The number of layers up to the last one of the first `count` layers of before."""
    return max((new + 1 for new, old in enumerate(kept) if old < count), default=0)


def _listed(config: Any, name: str) -> list[int]:
    value = vars(config).get(name)
    return [value] if isinstance(value, int) else [*(value or ())]


def _mend(config: Any, name: str, found: list[int], changes: Changes, wording: Wording) -> None:
    before = vars(config).get(name)
    if not found:
        return
    listed = _listed(config, name)
    if len({*found}) < len({*listed}) or (name in LAYER_FIELDS and min(found) < min(0, *listed)):
        raise ValueError(
            f"layers: expected one {wording.layers} for each of {name}, got {before}; use {wording.temporary}"
        )
    changes.set(config, name, found[0] if isinstance(before, int) else type(before)(found))


def _mend_stages(config: Any, depth: int, kept: list[int], changes: Changes) -> None:
    """Mends the config of a backbone, whose stages are "stem" and one for each layer."""
    names, handed = vars(config).get("stage_names"), vars(config).get("_out_indices")
    if not names or len(names) != depth + 1:
        return
    more = [f"stage{number}" for number in range(len(names), len(kept) + 1)]
    left = [*names[: len(kept) + 1], *more]
    changes.set(config, "stage_names", left)
    if handed is None:
        return
    found = [_left_of(kept, stage % len(names)) for stage in handed]
    if len({*found}) < len(found):
        wording = wording_of(kept)
        raise ValueError(
            f"layers: expected one {wording.layers} for each stage of out_indices, got {handed}; use "
            f"{wording.temporary}"
        )
    changes.set(config, "_out_indices", found)
    changes.set(config, "_out_features", [left[stage] for stage in found])
