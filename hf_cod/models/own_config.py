"""Copies a model's configs, because models that were built from the same config object share it."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .shapes import view_of


def own_config(model: nn.Module) -> None:
    """Replaces the configs of a model, wrapped or not, by copies, before a config is changed.

    Modules that shared a config share its copy. `quantization_config` is not copied, because the model's quantizer
    holds the same object. A model without a head keeps its configs: it may be part of a model with a head, which is
    saved with the config that both share.
    """
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is not None and whole.base_model is whole:
        return
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]
    storage = [getattr(config, "quantization_config", None) for *_, config in held]
    copies: dict[int, Any] = {id(settings): settings for settings in storage}
    for attributes, name, config in held:
        kind: Any = type(config)
        numbers = getattr(kind, "own_numbers", None)
        if numbers is None:
            attributes[name] = copy.deepcopy(config, copies)
        else:
            attributes[name] = view_of(copy.deepcopy(kind.viewed, copies), numbers)
