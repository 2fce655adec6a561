"""Checks the moments and bases in a saved state of OwLoreAdamW, before a run resumes from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.low_rank import is_tall
from hf_cod.training.owlore import eight_bit
from hf_cod.training.owlore.moments import is_projected
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.optimizer_state import KEY, check_state

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a saved tensor -> its dtype and shape."""


def check_own_entries(optimizer: OwLoreAdamW, state_dict: dict[str, Any], step: int) -> None:
    """Checks what OwLoreAdamW saves in addition to other optimizers.

    Raises:
        ValueError: the state is of another step, of other settings or of another model.
    """
    own = optimizer.state_dict()[KEY]
    saved = state_dict[KEY]
    if not isinstance(saved, dict) or saved.keys() != own.keys() or type(saved["shapes"]) is not list:
        raise ValueError(f"state_dict: expected the entries {', '.join(own)}, got others")
    if saved["steps"] != step:
        raise ValueError(f"state_dict: expected step {step}, got {saved['steps']!r}")
    if len(saved["shapes"]) != len(own["shapes"]):
        raise ValueError(f"state_dict: expected {len(own['shapes'])} parameters, got {len(saved['shapes'])}")
    described = {name: value for name, value in own.items() if name not in ("steps", "shapes")}
    check_state(state_dict, described, optimizer.param_groups, own["shapes"])


def layouts(optimizer: OwLoreAdamW) -> list[Layout]:
    """For each parameter, in their order, the tensors of its state."""
    shapes = iter(optimizer.state_dict()[KEY]["shapes"])
    settings = optimizer.settings
    return [
        _layout(p, next(shapes), optimizer.ranks.get(id(p)), settings.moments == "8bit")
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def layers_with_state(optimizer: OwLoreAdamW, step: int) -> set[int | None]:
    """The groups (a layer, or None for what always trains) that have a state after this step."""
    interval, active = optimizer.settings.interval, optimizer.sampler.draw(step // optimizer.settings.interval)
    return {None, *(active if step % interval else ())}


def _layout(parameter: Tensor, shape: Sequence[int], rank: int | None, eight_bits: bool) -> Layout:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    full = torch.empty(tuple(shape), device="meta")
    found: Layout = {"step": (torch.float64, ())}
    moment = tuple(shape)
    if is_projected(full, rank):
        assert rank is not None
        rows, columns = shape[-2:]
        found["draw"] = (torch.int64, tuple(shape[:-2]))
        found["basis"] = (dtype, (*shape[:-2], min(rows, columns), rank))
        moment = (*shape[:-2], rows, rank) if is_tall(full) else (*shape[:-2], rank, columns)
    size = torch.Size(moment).numel()
    for name in ("exp_avg", "exp_avg_sq"):
        found[name] = (dtype, moment)
        if eight_bits and size >= eight_bit.LEAST:
            found[name] = (torch.uint8, moment)
            found[f"{name}_scale"] = (torch.float32, (-(-size // eight_bit.BLOCK),))
    return found
