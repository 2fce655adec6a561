"""The part of a model that runs its layers without the head."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def trunk_of(model: nn.Module, layers: nn.ModuleList) -> Any:
    """The base model, if its forward runs the layers on the inputs of the model; else the model."""
    base: Any = getattr(model, "base_model", model)
    read, given = (inspect.signature(module.forward).parameters for module in (base, model))
    # The base of DINOv3 is its encoder, which takes embeddings; that of TimesFM requires what its head makes.
    required = (p.name for p in read.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    if getattr(model, "main_input_name", "input_ids") not in read or any(name not in given for name in required):
        return model
    # The decoder of ViT-MAE is outside of its base.
    return base if any(inner is layers for inner in base.modules()) else model
