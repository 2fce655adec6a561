"""OwLoreModel: a model whose layers' matrices have OwLore adapters."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import nn

from hf_cod.decoder_layers import DecoderLayers, find_decoder_layers, is_linear_like
from hf_cod.finetuning.adapters.layer import OwLoreLinear, shape_of


class OwLoreModel(BaseTuner):
    """What `get_peft_model` puts around a model; see `OwLoreConfig`."""

    prefix = "owlore_"
    tuner_layer_cls = OwLoreLinear

    def lost_energy(self, adapter_name: str = "default") -> dict[str, float]:
        """Of each matrix the share of the squares of what it learnt that folding cut off (`Increment`)."""
        return {
            name: module.owlore_increment[adapter_name].lost_energy()  # type: ignore[operator]
            for name, module in self.model.named_modules()
            if isinstance(module, OwLoreLinear) and adapter_name in module.owlore_increment
        }

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        """Targets all matrices of the layers where none are named.

        Raises:
            ValueError: a rank above the width of the widest one.
        """
        stack = find_decoder_layers(self.model)
        found = {name: module for index in range(len(stack)) for name, module in stack.linears(index).items()}
        if peft_config.target_modules is None:
            peft_config.target_modules = {name.rsplit(".", 1)[-1] for name in found}
        width = max(min(shape_of(module)) for module in found.values())
        if peft_config.r > width:
            raise ValueError(f"r: expected at most {width}, the width of the layers' matrices, got {peft_config.r}")
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
    ) -> None:
        if isinstance(target, OwLoreLinear):
            target.update_layer(adapter_name, peft_config)
            return
        self._check_target(target, current_key)
        new = OwLoreLinear(target, adapter_name, peft_config, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _check_target(self, target: nn.Module, name: str) -> None:
        stack: DecoderLayers = find_decoder_layers(self.model)
        if stack.index_of(name) is None or not is_linear_like(target):
            raise ValueError(
                f"target_modules: expected matrices of the layers in {stack.path}, got {name} "
                f"({type(target).__name__}); what else is to train goes into modules_to_save"
            )


