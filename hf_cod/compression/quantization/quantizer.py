"""The quantizer by which transformers loads, saves and unpacks quantized models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.quantization.config import OwlBnbConfig
from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.compression.quantization.factor_inputs import inputs_of
from hf_cod.compression.quantization.plan import plan_by, recorded, what_is_lost
from hf_cod.compression.quantization.rounding import Rounding, new_experts, new_module, round_matrix
from hf_cod.compression.quantization.stored_modules import (
    check_range,
    check_stored,
    is_quantized,
    loaded_module,
    to_linear,
    to_parameter,
)
from hf_cod.compression.quantization.widths import Width, is_width, widths_of
from hf_cod.functional.bits import SCALE_BITS
from hf_cod.layers.checks import check_separate
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.experts import ExpertMatrix, check_weight_in_memory, expert_matrices
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.orientation import is_linear
from hf_cod.layers.replacement_modules import ignore_signs, keep_names, names_in, signs
from hf_cod.layers.replacement_modules import replace as replace_module
from hf_cod.layers.sensitive_modules import left_notes
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.models.expert_parameters import ExpertParameter
from hf_cod.models.stored_config import clear_quantized, mark_stored, unmark_stored

logger = logging.getLogger(__name__)


class OwlBnbQuantizer(HfQuantizer):
    """Replaces the layers' matrices by quantized ones before their tensors are loaded, and fills them while loading."""

    quantization_config: OwlBnbConfig
    statistics: LayerStatistics | None = None
    _has_experts = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Imports bitsandbytes, so that a missing installation fails before gigabytes are read."""
        import hf_cod.compression.quantization.bnb  # noqa: F401

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        mark_stored(model)
        banks = _banks(model)
        if self.pre_quantized:
            self.quantization_config.modules = _modules_of(model, self.quantization_config.modules, banks)
            ignore_signs(model)
        else:
            self._choose(model)
        config = self.quantization_config
        for name, bits in config.modules.items():
            if name not in banks:
                linear = model.get_submodule(name)
                replace_module(model, name, new_module(linear, int(bits), config, config.compute_dtype))
            elif self.pre_quantized:  # else once its weights are read, which have the parameter's name
                replace_module(model, name, new_experts(banks[name], bits, config, config.compute_dtype))

    def _choose(self, model: Any) -> None:
        config = self.quantization_config
        stack = find_decoder_layers(model)
        if config.statistics is not None:
            config.statistics.check(stack)
        stack = choose_modules(stack, config).stack
        check_separate(stack)
        use = check_unwritten(stack.model)
        plan = plan_by(stack, config)
        self.statistics = config.statistics
        for sentence in (*what_is_lost(config, plan, calibrated=False), *use.notes_on(stack)):
            logger.warning("%s", sentence)
        self.quantization_config = recorded(config, plan)
        for sentence in left_notes(stack, {n: why for n, why in plan.left.items() if why != "skipped"}):
            logger.warning("%s", sentence)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is a matrix, or a bank of experts, to quantize."""
        module, _, key = param_name.rpartition(".")
        modules = self.quantization_config.modules
        return not self.pre_quantized and (param_name in modules or (key == "weight" and module in modules))

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight, by which a device map is made; banks of experts are still dense then."""
        bits = self.quantization_config.modules.get(param_name)
        if self.pre_quantized or bits is None:
            return super().param_element_size(model, param_name, param)
        widths = widths_of(bits, param.shape[0])
        return (sum(widths) / len(widths) + SCALE_BITS) / 8

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without conversions of dense banks of experts (a transposition) whose name those of quantized ones match."""
        found = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return found
        modules = model.named_modules()
        keys = [f"{name}.weight" for name, module in modules if isinstance(module, QuantizedExperts)]
        return [one for one in found if not (isinstance(one, WeightConverter) and _matches(one, keys))]

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a matrix while it is loaded."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, loaded: bool = True, **kwargs: Any) -> None:
        from hf_cod.compression.quantization.bnb import Linear4bit

        for name in self.quantization_config.modules:
            module = loaded_module(model, name)
            if not self.pre_quantized and any(p.device.type == "meta" for p in module.parameters()):
                raise ValueError(
                    f"device_map: expected no quantized layer on disk, got {name} there; quantize in memory "
                    "(device_map='cpu'), save, and load the saved model with layers on disk"
                )
            if loaded:
                check_stored(module, name)
            module.scales.requires_grad_(False)  # transformers loads tensors of floating point as trainable ones
            self._has_experts = self._has_experts or isinstance(module, QuantizedExperts)
            check_range(module, name, self.quantization_config.compute_dtype or model.dtype)
            if isinstance(module, Linear4bit):
                module.bind()
        self.statistics = None
        mark_stored(model)
        keep_names(model, self.quantization_config.modules)
        model.is_loaded_in_4bit = True  # by which PEFT and accelerate recognize quantized layers

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors, and the marker that makes loading without this package fail with an instruction."""
        return {**model.state_dict(), **signs()}, {}

    @torch.no_grad()
    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained makes it a string
        dtype = dtype or model.dtype  # None, if the model was not loaded
        if any(getattr(getattr(module, "base_layer", None), "bits", None) == 4 for module in model.modules()):
            raise ValueError(
                "model: expected no adapters on 4-bit layers, got some, which could not be merged afterwards; save "
                "them, dequantize the model without them, and load them on it"
            )
        packed = [(n, m) for n, m in model.named_modules() if is_quantized(m) or isinstance(m, QuantizedExperts)]
        for name, module in packed:
            check_weight_in_memory(name, module.scales.absmax)
        for name, module in packed:
            if is_quantized(module):
                replace_module(model, name, to_linear(module, dtype))
            else:
                replace_module(model, name, to_parameter(module, dtype))
        unmark_stored(model)
        clear_quantized(model)
        model.is_loaded_in_4bit = False
        return model.to(dtype)

    def is_serializable(self) -> bool:
        """Quantized models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on a quantized model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Each matrix is one operator for torch.compile, except those of banks: which experts run, the tokens say."""
        return not self._has_experts


class _Quantize(ConversionOps):
    """Converts a matrix of the checkpoint to codes and scales."""

    def __init__(self, quantizer: OwlBnbQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """See the class."""
        result: dict[str, Any] = {}
        for key, value in input_dict.items():
            W = value[0] if isinstance(value, list) else value
            if key in self.quantizer.quantization_config.modules:
                name, tensors = key, self._of_experts(model, key, W)
                kwargs["missing_keys"].discard(key)
            else:
                name = key.removesuffix(".weight")
                tensors = self._of_matrix(model.get_submodule(name), name, W)
            result |= {f"{name}.{part}": nn.Parameter(t, requires_grad=False) for part, t in tensors.items()}
        return result

    def _of_matrix(self, module: Any, name: str, W: Tensor) -> dict[str, Tensor]:
        W = W.mT if module.was_transposed else W
        _check_shape(name, W, (module.out_features, module.in_features))
        statistics = self.quantizer.statistics
        squares = None if statistics is None else statistics.of(name)
        return round_matrix(W, module.bits, self.quantizer.quantization_config, name, squares)

    def _of_experts(self, model: Any, name: str, W: Tensor) -> dict[str, Tensor]:
        """Quantizes all experts, and puts the module that holds them in the place of the parameter."""
        config = self.quantizer.quantization_config
        matrix = _bank(model, name)
        _check_shape(name, W, matrix.parameter.shape)
        module = new_experts(matrix, config.modules[name], config, config.compute_dtype)
        rounding = Rounding(name, module.widths, config, inputs_of(matrix, self.quantizer.statistics))
        tensors = rounding.of_experts(matrix.matrices_of(W))
        replace_module(model, name, module)
        return tensors


def _check_shape(name: str, W: Tensor, shape: Sequence[int]) -> None:
    if W.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected a matrix {tuple(shape)}, got {tuple(W.shape)}")


def _banks(model: Any) -> dict[str, ExpertMatrix]:
    """Name -> matrices of experts in one parameter, or their factors."""
    modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, ExpertParameter)]
    return {part.name: part for matrix in expert_matrices(modules) for part in matrix.parts()}


def _bank(model: Any, name: str) -> ExpertMatrix:
    """The matrices of experts, or their factors, of this name."""
    place = name.rpartition(".")[0]
    if isinstance(model.get_submodule(place), ExpertParameter):
        place = place.rpartition(".")[0]
    found = expert_matrices([(place, model.get_submodule(place))])
    return next(part for matrix in found for part in matrix.parts() if part.name == name)


def _matches(conversion: Any, keys: Sequence[str]) -> bool:
    """Whether a conversion of transformers applies to a tensor of one of these names."""
    return any(copy.deepcopy(conversion).rename_source_key(key)[1] is not None for key in keys)


def _modules_of(model: Any, modules: dict[str, Width], banks: Mapping[str, ExpertMatrix]) -> dict[str, Width]:
    """The modules of a checkpoint, by their names in this model.

    Raises:
        ValueError: there are none, one is not a matrix of the model, or one has bits for another number of experts.
    """
    if not modules:
        raise ValueError("modules: expected the names of the quantized matrices, got none; config.json is damaged")
    places = names_in(model, modules, banks)
    for name, place in places.items():
        if place in banks:
            if not is_width(modules[name], banks[place].experts):
                raise ValueError(
                    f"modules: expected bits of {banks[place].experts} experts, got {modules[name]} ({name})"
                )
        elif not is_linear(model.get_submodule(place)) or not is_width(modules[name], 0):
            raise ValueError(f"modules: expected matrices of {type(model).__name__}, got {name!r}")
    return {place: modules[name] for name, place in places.items()}
