"""Models that were built from one config object share it: what is written into it for one of them holds for all."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def own_config(model: nn.Module) -> None:
    """Gives a model, wrapped or not, copies of its configs, before something is written into one of them.

    All its modules share the copies as they shared what these are copied from; settings of quantized storage, which its
    quantizer holds, too, stay the same object. A model without a head keeps what it has: it may be part of one with a
    head, which is saved with the config that both share.
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
        attributes[name] = copy.deepcopy(config, copies)
