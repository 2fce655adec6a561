"""OwLoreLinear: a linear module of any kind with the increments of one or more adapters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from hf_cod.layers.orientation import shape_of, turned
from hf_cod.training.adapters.config import OwLoreConfig
from hf_cod.training.owlore.increment import Increment


class OwLoreLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + x D^T, with D the sum of the active adapters' increments.

    The base is only called; its weight is read and written by `merge` alone. It may be nn.Linear, Conv1D, a module of
    bitsandbytes, or any other module with in_features and out_features.

    Args:
        base_layer: the linear module.
        adapter_name: name of the first adapter.
        config: settings of the first adapter.
        held: see `Increment`.
        **quantization: arguments of PEFT's quantization backends.

    Attributes:
        misread: whether PEFT reads the name of the matrix as that of experts, see `is_misread`.
    """

    misread = False

    adapter_layer_names = ("owlore_increment",)
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: OwLoreConfig,
        held: tuple[int, int] = (0, 0),
        **quantization: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_of(base_layer)
        self.owlore_increment = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self.update_layer(adapter_name, config, held)

    def update_layer(self, adapter_name: str, config: OwLoreConfig, held: tuple[int, int] = (0, 0)) -> None:
        """Adds an adapter with an increment of 0; its rank is at most the smaller dimension of the matrix."""
        base = self.get_base_layer()
        _, dtype = self._get_base_layer_device_and_dtype(base)
        plain = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False), *base.parameters(), *base.buffers()]
        rank = min(config.r, self.in_features, self.out_features)
        self.owlore_increment[adapter_name] = Increment(
            self.in_features,
            self.out_features,
            rank,
            config.max_rank or 2 * config.r,
            held,
            device=tensors[0].device if tensors else None,
            dtype=torch.promote_types(plain, torch.float32),
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's method, except that layers which the optimizer has frozen stay frozen."""
        super().set_adapter(adapter_names, inference_mode)
        for increment in self._increments():
            if increment.resting:
                increment.requires_grad_(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in self.active_adapters:
            if name in self.owlore_increment:
                y = self.owlore_increment[name](y, x)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """D in the layout of the base's weight: (out, in), for a Conv1D (in, out)."""
        return turned(self.get_base_layer(), self._increment(adapter).dense())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' increments to the base's weight; a quantized weight is dequantized and quantized again.

        Raises:
            ValueError: the base's weight cannot be written; with `safe_merge`, the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.owlore_increment:
                self._add(self.get_delta_weight(name), safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the merged increments, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(-self.get_delta_weight(self.merged_adapters.pop()), False)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.tuners.lora.save_as_lora` converts it to a LoRA adapter that loads without this package.

        Not if PEFT would load that LoRA into a bank of experts, because of the name of the matrix.
        """
        return not self.misread

    def _add(self, delta: Tensor, safe: bool) -> None:
        backend, base = self.quantization_backend, self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        plain = isinstance(weight, nn.Parameter) and weight.is_floating_point()
        if not (plain if backend is None else backend.supports_merge):
            raise ValueError(
                f"merge: expected a weight that can be written, got {type(base).__name__}; export the adapter by "
                "peft.tuners.lora.save_as_lora, or dequantize the model first"
            )
        weight = self.get_base_weight()
        total = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        if safe and not bool(total.isfinite().all()):
            raise ValueError("merge: expected a finite sum of weight and increment, got NaN or infinity")
        self.set_base_weight(total)

    def _increment(self, name: str) -> Increment:
        if name not in self.owlore_increment:
            raise ValueError(f"adapter: expected one of {', '.join(self.owlore_increment)}, got {name!r}")
        return self.owlore_increment[name]  # type: ignore[return-value]

    def _increments(self) -> list[Increment]:
        return [self._increment(name) for name in self.owlore_increment]
