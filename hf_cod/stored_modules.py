"""What modules that store their matrix in a form of their own have in common: how they take a Linear's place, and how a
checkpoint of them tells a reader what it needs.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install hf_cod, then import hf_cod before from_pretrained"
# Written beside the weights and never read. Without this package transformers warns of an unknown method, reports the
# tensors that it has no place for, and goes on with random weights where nothing else is wrong: so the report says what
# is missing, and weights of another shape than the model's make it an error.
_SIGN = "this_checkpoint_needs_pip_install_hf_cod_then_import_hf_cod"


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the submodule `name` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def local_name(model: Any, name: str) -> str | None:
    """The name in `model` of the submodule that a checkpoint calls `name`, or None: a model without its head has names
    without `base_model_prefix`, and may load what was saved with it, or the other way round.
    """
    prefix = f"{model.base_model_prefix}."
    known = {found for found, _ in model.named_modules()}
    return next((found for found in (name, name.removeprefix(prefix), prefix + name) if found in known), None)


def signs(*emptied: str) -> dict[str, Tensor]:
    """Tensors to write beside the others, for whoever loads them without this package.

    Args:
        *emptied: a weight of the stock model that this checkpoint lacks, if none that it has is of another shape.
    """
    return {key: torch.empty(0) for key in (_SIGN, *emptied)}


def ignore_signs(model: Any, *emptied: str) -> None:
    """Lets `from_pretrained` of this package pass over them."""
    ignored = {re.escape(key) + "$" for key in signs(*emptied)}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
