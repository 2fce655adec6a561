"""OwLoreBank: a module with banks of experts, with the increments of one or more adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_cod.layers.experts import ExpertMatrix, check_weight_in_memory
from hf_cod.training.adapters.config import OwLoreConfig
from hf_cod.training.owlore.bank_increment import BankIncrement


class OwLoreBank(nn.Module, BaseTunerLayer):
    """Runs its base with W + D in the place of each adapted parameter W (experts, rows, columns).

    The base's forward pass is its own: during a call the sums shadow the parameters. A sum is a copy of the bank. It is
    kept for the backward pass, except under activation checkpointing. Layers without an update use W itself.

    Args:
        base_layer: the module that holds the parameters.
        matrices: parameter -> its matrix of experts.

    Attributes:
        turned: parameter -> whether its matrices are stored as (in, out).
    """

    adapter_layer_names = ("owlore_increment",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, matrices: dict[str, ExpertMatrix]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.turned = {key: matrix.transposed for key, matrix in matrices.items()}
        self._shapes = {key: (matrix.experts, *matrix.shape) for key, matrix in matrices.items()}
        self.owlore_increment = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []

    def update_layer(self, adapter_name: str, config: OwLoreConfig, held: dict[str, tuple[int, int]]) -> None:
        """Adds an adapter with increments of 0; `held` has the adapted parameters, for its values see `Increment`."""
        if not self.owlore_increment:
            self._active_adapter = adapter_name
        self.owlore_increment[adapter_name] = nn.ModuleDict(
            {key: self._new(key, config, columns) for key, columns in held.items()}
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new(self, key: str, config: OwLoreConfig, held: tuple[int, int]) -> BankIncrement:
        experts, m, n = self._shapes[key]
        W: Any = getattr(self.base_layer, key)
        dtype = torch.promote_types(W.dtype, torch.float32)
        return BankIncrement(
            n, m, min(config.r, m, n), config.max_rank or 2 * config.r, held, W.device, dtype, (experts,)
        )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's method, except that layers which the optimizer has frozen stay frozen."""
        super().set_adapter(adapter_names, inference_mode)
        for module in self.owlore_increment.modules():
            if isinstance(module, BankIncrement) and module.resting:
                module.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        with self._shadowed():
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _shadowed(self) -> Iterator[None]:
        """Within it, the base's attributes are the sums. Its parameters keep their places, and their order."""
        own: dict[str, Any] = vars(self.base_layer)
        shadows: dict[str, Tensor] = {}
        for name in self.active_adapters:
            for key, increment in self.of(name).items():
                W: Any = shadows.get(key, self.base_layer._parameters[key])
                check_weight_in_memory(key, W)
                shadows[key] = increment(W, self.turned[key])
        own.update(shadows)
        try:
            yield
        finally:
            for key in shadows:
                own.pop(key, None)

    def __getattr__(self, name: str) -> Any:
        """Attributes that models read from the module of the experts are those of the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def of(self, adapter_name: str) -> dict[str, BankIncrement]:
        """Parameter -> increment of an adapter; empty if it has none here."""
        held: Any = self.owlore_increment
        return dict(held[adapter_name].items()) if adapter_name in held else {}

    def get_delta_weight(self, adapter: str, key: str) -> Tensor:
        """D of one parameter, as it is stored."""
        with torch.no_grad():
            delta = self.of(adapter)[key].dense()
        return delta.mT if self.turned[key] else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' increments to the base's parameters.

        Raises:
            ValueError: with `safe_merge`, a sum is not finite; a parameter is offloaded.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            found = self.of(name)
            if found:
                sums = {key: D.added(self._parameter(key), self.turned[key]) for key, D in found.items()}
                if safe_merge and not all(bool(total.isfinite().all()) for total in sums.values()):
                    raise ValueError("merge: expected a finite sum of weight and increment, got NaN or infinity")
                for key, total in sums.items():
                    self._parameter(key).copy_(total)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the merged increments, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for key in self.of(name):
                W = self._parameter(key)
                W.copy_(-self.get_delta_weight(name, key) + W)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's `save_as_lora` converts matrices of modules only; `model.save_as_lora` converts banks, too."""
        return not self.of(adapter_name)

    def _parameter(self, key: str) -> Tensor:
        W: Any = self.base_layer._parameters[key]
        check_weight_in_memory(key, W)
        return W
