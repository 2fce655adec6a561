"""Attributes and config fields that count the experts of a layer, or those of a token, told by their names."""

from __future__ import annotations

import re

from torch import nn

# Attributes that count the experts of a stack of 2-D parameters: "num_experts", "moe_num_experts", "n_routed_experts".
_COUNTS = re.compile(r"(^|_)(num|n|total)_(\w+_)?experts")
# Attributes that say to how many experts a token is routed: "top_k", "moe_topk", "num_experts_per_tok".
_TOP_K = re.compile(r"top_?k$|^(moe_)?k$|(^|_)num_experts_per_tok(en)?$|(^|_)num_selected_experts$")


def counts_of(module: nn.Module) -> set[int]:
    """The numbers of routed experts that a module counts in attributes."""
    found = {key: value for key, value in vars(module).items() if _COUNTS.search(key) and type(value) is int}
    return {value for key, value in found.items() if "shared" not in key}


def counts_experts(name: str) -> bool:
    """Whether an attribute or config field of this name counts the routed experts of a layer."""
    return bool(_COUNTS.search(name)) and not is_top_k(name) and "shared" not in name


def is_top_k(name: str) -> bool:
    """Whether an attribute or config field of this name says to how many experts a token is routed."""
    return bool(_TOP_K.search(name))
