"""An OwLore adapter as LoRA, in PEFT's files, which load without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor, nn

from hf_cod.functional.low_rank import truncate
from hf_cod.io.files import write_aside
from hf_cod.layers.adaptable_banks import is_misoriented
from hf_cod.training.adapters.bank import OwLoreBank
from hf_cod.training.adapters.layer import OwLoreLinear
from hf_cod.training.owlore.increment import Increment

WRAPPER = "base_model.model."  # prefix of module names inside a PeftModel


def save_lora(model: nn.Module, config: Any, adapter_name: str, directory: str | Path, rank: int | None) -> int:
    """Writes the adapter as LoRA of one rank, with the scaling 1; see `OwLoreModel.save_as_lora`.

    Args:
        model: the model inside the PeftModel.
        config: the adapter's.
        adapter_name: its name.
        directory: for `adapter_config.json` and `adapter_model.safetensors`.
        rank: of all products; None: the lowest one that is exact.

    Returns:
        The rank.

    Raises:
        ValueError: a rank below 1; matrices whose names PEFT reads as those of experts and whose weights are no
            numbers; a bank of one expert that PEFT would adapt in another orientation.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, OwLoreLinear | OwLoreBank)}
    exact = max(1, *(m.factors()[0].shape[-1] for w in modules.values() for m in _of(w, adapter_name).values()))
    rank = exact if rank is None else rank
    names: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        found = _of(module, adapter_name)
        for number, (key, increment) in enumerate(found.items()):
            A, B = _factors(module, key, increment, rank)
            inner = ".base_layer" * (len(found) - 1 - number)  # PEFT nests the modules of a bank's parameters
            tensors[f"{WRAPPER}{name}{inner}.lora_A.weight"] = A
            tensors[f"{WRAPPER}{name}{inner}.lora_B.weight"] = B
            names["target_parameters" if key else "target_modules"].append(f"{name}.{key}" if key else name)
    saved: dict[str, Any] = {key: sorted(value) for key, value in names.items()}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        **{**saved, "target_parameters": saved["target_parameters"] or None},
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    Path(directory).mkdir(parents=True, exist_ok=True)
    data = save({**tensors, **_whole(model, adapter_name)}, {"format": "pt"})
    write_aside(Path(directory) / SAFETENSORS_WEIGHTS_NAME, lambda file: file.write(data))
    lora.save_pretrained(str(directory))
    return rank


def _of(module: OwLoreLinear | OwLoreBank, adapter_name: str) -> dict[str, Increment]:
    """Key -> increment, in the order in which PEFT wraps the parameters of a bank; the key "" for a Linear-like module.

    Raises:
        ValueError: PEFT would load the LoRA of this module into experts, and cannot adapt its weight as a parameter; or
            it would transpose the product of a bank.
    """
    if isinstance(module, OwLoreBank):
        held = module.of(adapter_name)
        if any(is_misoriented(module.base_layer, D.experts[0]) for D in held.values()):
            raise ValueError(
                "adapter: expected a bank of two experts or more, got one expert stored as (in, out), which PEFT would "
                "adapt as (out, in); merge the adapter"
            )
        return {key: held[key] for key in module.base_layer._parameters if key in held}
    if adapter_name not in module.owlore_increment:
        return {}
    if not module.misread:
        return {"": module._increment(adapter_name)}
    weight = getattr(module.get_base_layer(), "weight", None)
    if not (type(weight) is nn.Parameter and weight.is_floating_point()):
        raise ValueError(
            "adapter: expected names that PEFT reads as they are, got the name of experts; dequantize the model"
        )
    return {"weight": module._increment(adapter_name)}


@torch.no_grad()
def _factors(module: nn.Module, key: str, increment: Increment, rank: int) -> tuple[Tensor, Tensor]:
    """`lora_A.weight` and `lora_B.weight`, padded by zeros to the rank.

    For a bank of E experts they are (r E, columns), with the experts first, and (rows, r E), with the experts last. The
    product of an expert is that of its matrix as it is stored, except where the bank has PEFT's attribute
    `is_transposed`: there it is (out, in).
    """
    B, A, _ = truncate(*increment.factors(), rank)
    missing = rank - A.shape[-2]
    A = torch.cat([A, A.new_zeros(*A.shape[:-2], missing, A.shape[-1])], -2)
    B = torch.cat([B, B.new_zeros(*B.shape[:-1], missing)], -1)
    if isinstance(module, OwLoreBank):
        if module.turned[key] and not getattr(module.base_layer, "is_transposed", False):
            A, B = B.mT, A.mT
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A.cpu().contiguous(), B.cpu().contiguous()


def _whole(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The weights of modules that were trained in full, such as a head."""
    found = {}
    for name, module in model.named_modules():
        kept = getattr(module, "modules_to_save", None)
        if isinstance(kept, nn.ModuleDict) and adapter_name in kept:
            state = kept[adapter_name].state_dict()
            found.update({f"{WRAPPER}{name}.{key}": value.cpu().contiguous() for key, value in state.items()})
    return found
