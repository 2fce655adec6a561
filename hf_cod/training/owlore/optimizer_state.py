"""Checks of an optimizer's state_dict before a run resumes from it, and its moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_cod.io.module_names import FIELDS

KEY = "owlore"


def check_state(
    state_dict: dict[str, Any], described: dict[str, Any], groups: list[dict[str, Any]], shapes: Sequence[list[int]]
) -> dict[str, Any]:
    """Checks that an optimizer can resume from this state.

    Args:
        state_dict: the saved state.
        described: settings that must be the same when a run is resumed.
        groups: the optimizer's parameter groups.
        shapes: shapes of its parameters while they train.

    Returns:
        The entries that OwLoreAdamW saved in addition to those of every optimizer.

    Raises:
        ValueError: the state is of another optimizer, of other settings or of another model.
    """
    saved = state_dict.get(KEY)
    if saved is None:
        raise ValueError(f"state_dict: expected one of OwLoreAdamW, got one without {KEY!r}")
    unset = {name: None for name in FIELDS if name not in described}
    for name, value in {**described, **unset}.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name}: expected {saved.get(name)!r} as in the checkpoint, got {value!r}; resume with the same "
                "settings, or start a new run"
            )
    counts = [[len(group["params"]) for group in side] for side in (groups, state_dict["param_groups"])]
    if counts[0] != counts[1]:
        raise ValueError(f"state_dict: expected groups of {counts[0]} parameters, got {counts[1]}")
    for own_shape, shape in zip(shapes, saved["shapes"], strict=True):
        if own_shape != shape:
            raise ValueError(f"model: expected a parameter of {shape} as in the checkpoint, got one of {own_shape}")
    return saved


def states_of(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> defaultdict[Tensor, Any]:
    """Parameter of the groups -> copies of its moments and bases in a state_dict."""
    own, theirs = ([p for group in side for p in group["params"]] for side in (groups, state_dict["param_groups"]))
    states = {p: state_dict["state"].get(key, {}) for p, key in zip(own, theirs, strict=True)}
    return defaultdict(dict, {p: {k: v.clone() for k, v in s.items()} for p, s in states.items() if s})
