"""The device of a model's inputs, and the environment that reports record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


def check_in_memory(model: nn.Module) -> None:
    """Checks that each weight has values, in memory or where accelerate loads them from.

    In computations on a CPU, torch takes a weight on the meta device for one of arbitrary values.

    Raises:
        ValueError: a weight is on the meta device, with nothing to load it from; names it.
    """
    execution_device(model)
    left = [("", model)]
    while left:
        name, module = left.pop()
        hook = getattr(module, "_hf_hook", None)
        hooks = [each for each in (hook, *getattr(hook, "hooks", ())) if getattr(each, "offload", False)]
        missing = next((key for key, p in module.named_parameters(recurse=False) if p.is_meta and not hooks), None)
        if missing is not None:
            raise ValueError(
                f"model: expected weights in memory, got one on the meta device, {name}{missing}; load the model with "
                "from_pretrained"
            )
        if not any(each.place_submodules for each in hooks):
            left += [(f"{name}{child_name}.", child) for child_name, child in module.named_children()]


def check_not_offloaded(model: nn.Module, weights: Iterable[Tensor]) -> None:
    """Checks that accelerate's hooks do not load these weights for each forward pass, which would undo updates.

    Raises:
        ValueError: they do; names the first one.
    """
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    asked = {id(weight) for weight in weights}
    for name, weight in model.named_parameters():
        if weight.is_meta and id(weight) in asked:
            raise ValueError(
                f"model: expected weights in memory, got offloaded ones in {name}; load the model without offloading"
            )


@contextmanager
def random_state_restored(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restores torch's random state at the end of the block, of the CPU and of the model's GPUs.

    Args:
        model: the model that runs in the block.
        seed: the state in the block; None: that of the caller.
    """
    with torch.random.fork_rng(sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on `device`; values that are no tensors, such as flags of forward, are unchanged."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def environment_of(model: nn.Module) -> dict[str, str]:
    """The environment of a measurement for its report: versions, the model's device, the dtype of its first weight."""
    return environment(execution_device(model), next(model.parameters()).dtype)
