"""OwLoreModel: a model with OwLore adapters on the matrices of its layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from hf_cod.io.peft_names import is_misread
from hf_cod.io.schema import brief
from hf_cod.io.settings import Default
from hf_cod.layers.adaptable_banks import why_not_adaptable
from hf_cod.layers.checks import check_separate
from hf_cod.layers.devices import check_not_offloaded
from hf_cod.layers.direct_use import not_adaptable
from hf_cod.layers.experts import ExpertMatrix
from hf_cod.layers.modules import is_linear_like
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stock_four_bit import keep_unpacked
from hf_cod.training.adapters.bank import OwLoreBank
from hf_cod.training.adapters.export import WRAPPER, save_lora
from hf_cod.training.adapters.layer import OwLoreLinear
from hf_cod.training.owlore.active_layers import warn_of_untrained
from hf_cod.training.owlore.increment import PLACE, TENSORS, Increment

logger = logging.getLogger(__name__)


class OwLoreModel(BaseTuner):
    """The wrapper that `get_peft_model` puts around a model; see `OwLoreConfig`."""

    prefix = "owlore_"
    tuner_layer_cls = BaseTunerLayer  # of modules and of banks: `set_adapter` and `delete_adapter` must reach both
    _excluded: dict[str, str]

    def lost_energy(self, adapter_name: str | None = None) -> dict[str, float]:
        """For each matrix, the share of its update's squared norm that folding cut off (`Increment.lost_energy`).

        Args:
            adapter_name: an adapter; None: the first active one.

        Raises:
            ValueError: no adapter of that name.
        """
        asked = self._asked(adapter_name)
        return {name: increment.lost_energy() for name, _, increment in increments(self.model, asked)}

    def save_as_lora(self, directory: str | Path, rank: int | None = None, adapter_name: str | None = None) -> int:
        """Writes an adapter as LoRA, which PEFT loads without this package. Banks of experts are `target_parameters`.

        Args:
            directory: for `adapter_config.json` and `adapter_model.safetensors`.
            rank: of the products; a lower one than that of an increment cuts off its smallest singular values. None:
                the lowest one that is exact, at most `max_rank` + `r`.
            adapter_name: an adapter; None: the first active one.

        Returns:
            The rank.

        Raises:
            ValueError: no adapter of that name, a rank below 1, packed matrices whose names PEFT misreads, or a bank
                of one expert that PEFT would transpose.
        """
        asked = self._asked(adapter_name)
        return save_lora(self.model, self.peft_config[asked], asked, directory, rank)

    def _asked(self, adapter_name: str | None) -> str:
        asked = self.active_adapters[0] if adapter_name is None else adapter_name
        if asked not in self.peft_config:
            raise ValueError(f"adapter_name: expected one of {', '.join(self.peft_config)}, got {asked!r}")
        return asked

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: Any, config: Any, adapter_name: str, **rest: Any
    ) -> dict[str, Tensor]:
        """As PEFT's method; also stores the shapes in the config, which is saved next, for loaders that check them."""
        held = {name: (m.P.shape[-1], m.learnt) for name, _, m in increments(model, adapter_name)}
        config.held = {name.removeprefix(WRAPPER): ranks for name, ranks in held.items() if any(ranks)}
        return super()._get_adapter_state_dict(model, config, adapter_name, **rest)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT's method, also where names of parameters of a bank are behind the name of the adapter."""
        return key.replace(f".{PLACE}.{adapter_name}.", f".{PLACE}.")

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
        for _, place, _ in increments(model, adapter_name):
            for tensor in TENSORS:
                key = cls._remove_adapter_name_from_key(f"{place.removeprefix(WRAPPER)}.{tensor}", adapter_name)
                keys[key] = keys[WRAPPER + key] = f"{place}.{tensor}"
        found = {keys.get(key, key): value for key, value in state_dict.items()}
        _check_known(model, {*keys.values()}, found)
        for name, place, _ in increments(model, adapter_name):
            saved = {tensor: found[f"{place}.{tensor}"] for tensor in TENSORS if f"{place}.{tensor}" in found}
            _check_saved(name.removeprefix(WRAPPER), saved, config.held)
        return found

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        """Targets all matrices of the layers if `target_modules` is None.

        Raises:
            ValueError: no matrix can get an adapter, or a rank above the width of the widest matrix.
        """
        stack = find_decoder_layers(self.model)
        self._excluded = not_adaptable(stack)
        found = {n: m for i in range(len(stack)) for n, m in stack.linears(i).items() if n not in self._excluded}
        banks = _banks(stack)
        if not found and not banks:
            told = f": {next(iter(self._excluded.values()))}" if self._excluded else ""
            raise ValueError(f"target_modules: expected matrices of the layers that can get adapters, got none{told}")
        if peft_config.target_modules is None and peft_config.target_parameters is None:
            for name, reason in self._excluded.items():
                logger.warning("%s gets no adapter: %s", name, reason)
            peft_config.target_modules = set(found)  # PEFT shortens the names to unique suffixes
            chosen = [matrix for name, matrix in banks.items() if not self._is_excluded(peft_config, name)]
            peft_config.target_parameters = {matrix.name for matrix in chosen} or None
            check_separate(stack, {name for name in (*found, *banks) if not self._is_excluded(peft_config, name)})
            inside = {id(p) for module in found.values() for p in module.parameters()}
            inside.update(id(matrix.parameter) for matrix in chosen)
            warn_of_untrained(stack, [p for p in self.model.parameters() if id(p) in inside])
        width = max(min(shape) for shape in [*map(shape_of, found.values()), *(m.shape for m in banks.values())])
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
            ValueError: bitsandbytes has repacked 4-bit weights into a form that cannot be undone; offloaded layers.
        """
        check_not_offloaded(model, find_decoder_layers(self.model).module_list.parameters())
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
            target.update_layer(adapter_name, peft_config, _held(peft_config, current_key, shape_of(target)))
            return
        self._check_target(target, current_key)
        held = _held(peft_config, current_key, shape_of(target))
        new = OwLoreLinear(target, adapter_name, peft_config, held, **get_quantization_kwargs(self))
        new.misread = is_misread(self.model, target_name)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @staticmethod
    def _is_excluded(config: Any, name: str) -> bool:
        names = config.exclude_modules
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(f".{name}".endswith(f".{each}") for each in names or ())

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Replaces PEFT's method: one module holds the increments of all banks of a module.

        Raises:
            ValueError: a name that is of no bank that adapters can be added to.
        """
        banks, asked = _banks(find_decoder_layers(self.model)), peft_config.target_parameters
        found = {name: m for name, m in banks.items() if any(f".{name}".endswith(f".{each}") for each in asked)}
        unknown = [each for each in asked if not any(f".{name}".endswith(f".{each}") for name in found)]
        if unknown:
            raise ValueError(f"target_parameters: expected banks of experts of the layers, got {sorted(unknown)[0]}")
        for bank in dict.fromkeys(matrix.bank for matrix in found.values()):
            matrices = {m.key: m for name, m in banks.items() if m.bank == bank}
            held = {m.key: _held(peft_config, name, m.shape) for name, m in found.items() if m.bank == bank}
            target: Any = model.get_submodule(bank)
            if not isinstance(target, OwLoreBank):
                parent, _, last = bank.rpartition(".")
                target = OwLoreBank(target, matrices)
                setattr(model.get_submodule(parent), last, target)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                target.update_layer(adapter_name, peft_config, held)
            if adapter_name not in self.active_adapters:
                target.owlore_increment[adapter_name].requires_grad_(False)
        return [*found]

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
        check_separate(stack, {name})


def _banks(stack: DecoderLayers) -> dict[str, ExpertMatrix]:
    """The matrices of banks that adapters can be added to, by name."""
    return {
        matrix.name: matrix
        for index in range(len(stack))
        for matrix in stack.expert_matrices(index)
        if why_not_adaptable(matrix) is None
    }


def _held(config: Any, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Columns of P and of B in the saved adapter, checked before they are allocated.

    Raises:
        ValueError: more than a matrix of this shape can have.
    """
    P, B = config.held.get(name, (0, 0))
    most = min(shape)
    if max(P, B) > most:
        raise ValueError(f"held: expected at most {most} columns, the width of {name}, got {max(P, B)}")
    return P, B


def _check_known(model: nn.Module, own: set[str], found: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor that is neither of an increment nor of a module of the model."""
    known = {name.replace("_fsdp_wrapped_module.", "").removeprefix(WRAPPER) for name in model.state_dict()}
    for key in found:
        if key not in own and key.replace("_fsdp_wrapped_module.", "").removeprefix(WRAPPER) not in known:
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


def increments(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, Increment]]:
    """Yields (name of the matrix, name of its increment, the increment) for each matrix of the adapter."""
    for name, module in model.named_modules():
        place = f"{name}.{PLACE}.{adapter_name}"
        if isinstance(module, OwLoreLinear) and adapter_name in module.owlore_increment:
            yield name, place, module.owlore_increment[adapter_name]  # type: ignore[misc]
        elif isinstance(module, OwLoreBank):
            for key, increment in module.of(adapter_name).items():
                yield f"{name}.{key}", f"{place}.{key}", increment
