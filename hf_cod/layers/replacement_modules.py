"""What modules that store their matrix in a form of their own have in common: how they take a Linear's place, and how a
checkpoint of them tells a reader what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install hf_cod, then import hf_cod before from_pretrained"
# Written beside the weights and never read. Without this package AutoConfig refuses the file (`stored_config.py`), but
# a class of a family does not ask it: that warns of the type, reports the tensors that it has no place for, and goes on
# with random weights where nothing else is wrong. So the report says what is missing, and weights of another shape than
# the model's make it an error.
_SIGN = "this_checkpoint_needs_pip_install_hf_cod_then_import_hf_cod"


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the submodule `name` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def names_in(model: Any, recorded: Iterable[str]) -> dict[str, str]:
    """Where the modules that a checkpoint records stand in a model of its class or, with or without a head, of another.

    A base model's names lack the prefix (`base_model_prefix`) that they have in a model with a head; transformers
    renames the tensors in the same way. A head of the recorded model has no place in a model of another class.

    Args:
        model: what the checkpoint is loaded into; its config names the class that was saved.
        recorded: names in the model that was saved.

    Returns:
        Recorded name -> name in `model`, without the heads that it lacks.

    Raises:
        ValueError: a module that the model has not.
    """
    prefix, names = f"{model.base_model_prefix}.", [*recorded]
    mine = type(model).__name__
    of_another = mine not in (getattr(model.config, "architectures", None) or [mine])
    with_head = any(name.startswith(prefix) for name in names)
    places = {name for name, _ in model.named_modules()}
    found = {}
    for name in names:
        place = next((p for p in (name, name.removeprefix(prefix), prefix + name) if p in places), None)
        if place is not None:
            found[name] = place
        elif not (of_another and with_head and not name.startswith(prefix)):
            raise ValueError(f"modules: expected modules of {mine}, got {name!r}")
    return found


def signs(*emptied: str) -> dict[str, Tensor]:
    """Tensors to write beside the others, for whoever loads them without this package.

    Args:
        *emptied: a weight of the stock model that this checkpoint lacks, if none that it has is of another shape.
    """
    return {key: torch.empty(0) for key in (_SIGN, *emptied)}


def ignore_signs(model: Any, *emptied: str) -> None:
    """Lets `from_pretrained` of this package pass over them, by whatever names they have in this model."""
    ignored = {re.escape(key) + "$" for key in signs(*emptied)}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
