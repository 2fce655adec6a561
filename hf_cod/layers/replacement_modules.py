"""Common code of modules that replace a Linear and store its matrix in another format: how they are inserted, and how
their checkpoints say that they require this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

INSTALL = "pip install hf_cod, then import hf_cod before from_pretrained"
# Written next to the weights and never read. Without this package AutoConfig rejects the checkpoint
# (`stored_config.py`), but a model class such as LlamaForCausalLM does not use AutoConfig: it warns about the model
# type, reports unexpected tensors, and continues with random weights if nothing else is wrong. The name of this tensor
# then says in the report what is missing, and weights of another shape than the model's make it an error.
_SIGN = "this_checkpoint_needs_pip_install_hf_cod_then_import_hf_cod"


def replace(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Puts `module` where the submodule, or the parameter, `name` was."""
    parent, _, child = name.rpartition(".")
    around = model.get_submodule(parent)
    if isinstance(getattr(around, child), nn.Module) != isinstance(module, nn.Module):
        delattr(around, child)  # a module is not set in the place of a parameter, nor the reverse
    setattr(around, child, module)


def names_in(model: Any, recorded: Iterable[str], parameters: Iterable[str] = ()) -> dict[str, str]:
    """Maps module names in a checkpoint to names in a model of the same class, or of another with or without a head.

    In a base model the names lack the prefix (`base_model_prefix`) of a model with a head; transformers renames tensors
    in the same way. The head of the saved model is ignored in a model of another class.

    Args:
        model: the model that the checkpoint is loaded into; its config names the saved class.
        recorded: names in the saved model.
        parameters: names of parameters in `model` in whose place the saved model had modules.

    Returns:
        Recorded name -> name in `model`, without heads that `model` lacks.

    Raises:
        ValueError: a module that does not exist in the model.
    """
    prefix, names = f"{model.base_model_prefix}.", [*recorded]
    mine = type(model).__name__
    of_another = mine not in (getattr(model.config, "architectures", None) or [mine])
    with_head = any(name.startswith(prefix) for name in names)
    places = {name for name, _ in model.named_modules()} | {*parameters}
    found = {}
    for name in names:
        place = next((p for p in (name, name.removeprefix(prefix), prefix + name) if p in places), None)
        if place is not None:
            found[name] = place
        elif not (of_another and with_head and not name.startswith(prefix)):
            raise ValueError(f"modules: expected modules of {mine}, got {name!r}")
    return found


def keep_names(model: Any, modules: Iterable[str]) -> None:
    """Lets `save_pretrained` write the model's own names of tensors, if it would write others for these modules.

    For some families transformers writes the names of their first checkpoints, and joins matrices that the model holds
    apart (`core_model_loading`). These rules are for dense weights: with tensors of other formats they fail, or
    give files that only Auto classes can read. `from_pretrained` reads own names, too. Transformers' `dequantize`
    restores the rules.
    """
    tensors = {
        f"{name}.{key}": torch.empty_like(tensor, device="meta")
        for name in modules
        for key, tensor in model.get_submodule(name).state_dict().items()
    }
    try:
        unchanged = revert_weight_conversion(model, tensors).keys() == tensors.keys()
    except Exception:  # whatever a rule raises on tensors that are not those of a Linear
        unchanged = False
    if not unchanged:
        model._weight_conversions = []


def signs(*emptied: str) -> dict[str, Tensor]:
    """Tensors to write next to the others, as a message for users who load the checkpoint without this package.

    Args:
        *emptied: a weight of the stock model that the checkpoint lacks, if all weights that it has fit the stock model.
    """
    return {key: torch.empty(0) for key in (_SIGN, *emptied)}


def ignore_signs(model: Any, *emptied: str) -> None:
    """Lets `from_pretrained` of this package ignore the tensors of `signs`, under all their names in this model."""
    ignored = {re.escape(key) + "$" for key in signs(*emptied)}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
