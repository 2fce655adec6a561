"""OwLoreModel: a model with OwLore adapters on the matrices of its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from hf_cod.io.peft_names import is_misread
from hf_cod.io.schema import brief
from hf_cod.io.settings import Default
from hf_cod.layers.direct_use import not_adaptable
from hf_cod.layers.modules import is_linear_like
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stock_four_bit import keep_unpacked
from hf_cod.training.adapters.layer import OwLoreLinear
from hf_cod.training.owlore.active_layers import warn_of_untrained
from hf_cod.training.owlore.increment import TENSORS, Increment

logger = logging.getLogger(__name__)

_WRAPPER = "base_model.model."  # prefix of module names inside a PeftModel


class OwLoreModel(BaseTuner):
    """The wrapper that `get_peft_model` puts around a model; see `OwLoreConfig`."""

    prefix = "owlore_"
    tuner_layer_cls = OwLoreLinear
    _excluded: dict[str, str]

    def lost_energy(self, adapter_name: str | None = None) -> dict[str, float]:
        """For each matrix, the share of its update's squared norm that folding cut off (`Increment.lost_energy`).

        Args:
            adapter_name: an adapter; None: the first active one.

        Raises:
            ValueError: no adapter of that name.
        """
        asked = self.active_adapters[0] if adapter_name is None else adapter_name
        if asked not in self.peft_config:
            raise ValueError(f"adapter_name: expected one of {', '.join(self.peft_config)}, got {asked!r}")
        return {name: increment.lost_energy() for name, increment in _increments(self.model, asked)}

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: Any, config: Any, adapter_name: str, **rest: Any
    ) -> dict[str, Tensor]:
        """As PEFT's method; also stores the shapes in the config, which is saved next, for loaders that check them."""
        held = {name: (m.P.shape[1], len(m.A)) for name, m in _increments(model, adapter_name)}
        config.held = {name.removeprefix(_WRAPPER): ranks for name, ranks in held.items() if any(ranks)}
        return super()._get_adapter_state_dict(model, config, adapter_name, **rest)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's method, but with keys for empty tensors, too, which are missing in the model's state dict.

        PEFT ignores missing and unexpected tensors, with a warning at most; here they are errors.

        Raises:
            ValueError: tensors are missing, unknown, not finite, or no floating-point numbers.
        """
        keys = {}
        for name, _ in _increments(model, adapter_name):
            for tensor in TENSORS:
                key = f"{name.removeprefix(_WRAPPER)}.owlore_increment.{tensor}"
                keys[key] = keys[_WRAPPER + key] = f"{name}.owlore_increment.{adapter_name}.{tensor}"
        found = {keys.get(key, key): value for key, value in state_dict.items()}
        _check_known(model, {*keys.values()}, found)
        for name, _ in _increments(model, adapter_name):
            place = f"{name}.owlore_increment.{adapter_name}."
            saved = {tensor: found[place + tensor] for tensor in TENSORS if place + tensor in found}
            _check_saved(name.removeprefix(_WRAPPER), saved, config.held)
        return found

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        """Targets all matrices of the layers if `target_modules` is None.

        Raises:
            ValueError: no matrix can get an adapter, or a rank above the width of the widest matrix.
        """
        stack = find_decoder_layers(self.model)
        found = {name: module for index in range(len(stack)) for name, module in stack.linears(index).items()}
        self._excluded = not_adaptable(stack)
        found = {name: module for name, module in found.items() if name not in self._excluded}
        if not found:
            told = f": {next(iter(self._excluded.values()))}" if self._excluded else ""
            raise ValueError(
                f"target_modules: expected matrices in the layers that adapters can be added to, got none{told}"
            )
        if peft_config.target_modules is None:
            for name, reason in self._excluded.items():
                logger.warning("%s gets no adapter: %s", name, reason)
            peft_config.target_modules = set(found)  # PEFT shortens the names to unique suffixes
            inside = {id(p) for module in found.values() for p in module.parameters()}
            warn_of_untrained(stack, [p for p in self.model.parameters() if id(p) in inside])
        width = max(min(shape_of(module)) for module in found.values())
        if isinstance(peft_config.r, Default):
            if peft_config.r > width:
                logger.warning(
                    "r: %d instead of the default %d: the width of the layers' matrices", width, peft_config.r
                )
            peft_config.r = min(int(peft_config.r), width)  # a plain number, as files hold it
        if peft_config.r > width:
            raise ValueError(f"r: expected at most {width}, the width of the layers' matrices, got {peft_config.r}")
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Called before any adapter is added; keeps 4-bit weights in their unpacked form.

        Raises:
            ValueError: bitsandbytes has repacked 4-bit weights into a form that cannot be undone.
        """
        keep_unpacked(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, OwLoreLinear):
            target.update_layer(adapter_name, peft_config, _held(peft_config, current_key, target))
            return
        self._check_target(target, current_key)
        held = _held(peft_config, current_key, target)
        new = OwLoreLinear(target, adapter_name, peft_config, held, **get_quantization_kwargs(self))
        new.misread = is_misread(self.model, target_name)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces PEFT's method, which reads the base's weight; the new module is on its base's device already."""
        setattr(parent, child_name, new_module)

    def _check_target(self, target: nn.Module, name: str) -> None:
        stack: DecoderLayers = find_decoder_layers(self.model)
        if stack.index_of(name) is None or not is_linear_like(target):
            raise ValueError(
                f"target_modules: expected matrices of the layers in {stack.layers_path}, got {name} "
                f"({type(target).__name__}); name other modules that are to train in modules_to_save"
            )
        if name in self._excluded:
            raise ValueError(f"target_modules: expected other matrices than {name}: {self._excluded[name]}")


def _held(config: Any, name: str, target: nn.Module) -> tuple[int, int]:
    """Columns of P and of B in the saved adapter, checked before they are allocated.

    Raises:
        ValueError: more than a matrix of this shape can have.
    """
    P, B = config.held.get(name, (0, 0))
    most = min(shape_of(target))
    if max(P, B) > most:
        raise ValueError(f"held: expected at most {most} columns, the width of {name}, got {max(P, B)}")
    return P, B


def _check_known(model: nn.Module, own: set[str], found: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor that is neither of an increment nor of a module of the model."""
    known = {name.replace("_fsdp_wrapped_module.", "").removeprefix(_WRAPPER) for name in model.state_dict()}
    for key in found:
        if key not in own and key.replace("_fsdp_wrapped_module.", "").removeprefix(_WRAPPER) not in known:
            raise ValueError(f"adapter: expected tensors of this model's adapter, got {brief(key)}")


def _check_saved(name: str, saved: dict[str, Tensor], held: dict[str, tuple[int, int]]) -> None:
    """Checks that all tensors of a matrix were saved; empty ones are left out.

    Args:
        name: name of the matrix.
        saved: its tensors.
        held: columns of P and B by matrix, as the config has them; empty if the config has none.

    Raises:
        ValueError: tensors are missing, not finite, or no floating-point numbers.
    """
    alone = [pair for pair in ("NP", "AB") if len(saved.keys() & {*pair}) == 1]
    if "lost" not in saved or alone:
        wanted = " and ".join(alone[0]) if alone else "lost"
        raise ValueError(f"adapter: expected {wanted} of {name}, got {', '.join(saved) or 'no tensors'}")
    wanted_ranks = tuple(held.get(name, (0, 0)))
    ranks = (saved["P"].shape[-1] if "P" in saved else 0, saved["B"].shape[-1] if "B" in saved else 0)
    if held and ranks != wanted_ranks:
        raise ValueError(f"adapter: expected {wanted_ranks} columns of P and B of {name}, got {ranks}")
    for key, tensor in saved.items():
        if not tensor.is_floating_point():
            raise ValueError(f"adapter: expected floating-point numbers in {key} of {name}, got {tensor.dtype}")
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"adapter: expected finite numbers, got NaN or infinity in {key} of {name}")


def _increments(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Increment]]:
    """Yields (name of the matrix, its increment) for each matrix of the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, OwLoreLinear) and adapter_name in module.owlore_increment:
            yield name, module.owlore_increment[adapter_name]  # type: ignore[misc]
