"""The device of a model's inputs, and the environment that reports record."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_cod.io.report import environment
from hf_cod.io.text import Batch


def execution_device(model: nn.Module) -> torch.device:
    """The device for inputs: that of the first weight in memory, or of accelerate's hooks for offloaded weights.

    Raises:
        ValueError: all weights are on the meta device, with nothing to load them from.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    raise ValueError("model: expected weights, got a model on the meta device; load it with from_pretrained")


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on `device`; values that are no tensors, such as flags of forward, are unchanged."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def environment_of(model: nn.Module) -> dict[str, str]:
    """The environment of a measurement for its report: versions, the model's device, the dtype of its first weight."""
    return environment(execution_device(model), next(model.parameters()).dtype)
