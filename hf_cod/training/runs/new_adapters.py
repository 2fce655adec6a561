"""New adapters of PEFT on a model, with initial values by a seed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def require_peft(what: str) -> None:
    """Checks that PEFT is installed.

    Args:
        what: the setting that requires it, for the message.

    Raises:
        ImportError: it is not; the message gives the pip command.
    """
    if find_spec("peft") is None:
        raise ImportError(f"{what}: training adapters requires the peft package: pip install 'hf_cod[recovery]'")


def with_adapters(model: nn.Module, config: Any, seed: int) -> Any:
    """The PEFT model with new adapters, initialized by `seed`, and a config that is saved in a fixed order."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, config)
    for used in wrapped.peft_config.values():
        for name in ("target_modules", "target_parameters"):
            if isinstance(getattr(used, name, None), set):  # whose order differs from process to process
                setattr(used, name, sorted(getattr(used, name)))
    return wrapped
