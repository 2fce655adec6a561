"""The quantizer by which transformers loads, saves and unpacks quantized models."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.quantization.config import OwlBnbConfig
from hf_cod.compression.quantization.plan import plan_by, recorded, what_is_lost
from hf_cod.compression.quantization.rounding import new_module, round_matrix
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.orientation import is_linear, new_matrix
from hf_cod.layers.replacement_modules import ignore_signs, keep_names, names_in, signs
from hf_cod.layers.replacement_modules import replace as replace_module
from hf_cod.layers.sensitive_modules import left_notes
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.models.stored_config import clear_quantized, mark_stored, unmark_stored

logger = logging.getLogger(__name__)


class OwlBnbQuantizer(HfQuantizer):
    """Replaces the layers' matrices by quantized ones before their tensors are loaded, and fills them while loading."""

    quantization_config: OwlBnbConfig
    statistics: LayerStatistics | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Imports bitsandbytes, so that a missing installation fails before gigabytes are read."""
        import hf_cod.compression.quantization.bnb  # noqa: F401

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        mark_stored(model)
        if self.pre_quantized:
            self.quantization_config.modules = _modules_of(model, self.quantization_config.modules)
            ignore_signs(model)
        else:
            self._choose(model)
        config = self.quantization_config
        for name, bits in config.modules.items():
            replace_module(model, name, new_module(model.get_submodule(name), bits, config, config.compute_dtype))

    def _choose(self, model: Any) -> None:
        config = self.quantization_config
        stack = find_decoder_layers(model)
        if config.statistics is not None:
            config.statistics.check(stack)
        stack = choose_modules(stack, config).stack
        use = check_unwritten(stack.model)
        plan = plan_by(stack, config)
        self.statistics = config.statistics
        for sentence in (*what_is_lost(config, plan, calibrated=False), *use.notes_on(stack)):
            logger.warning("%s", sentence)
        self.quantization_config = recorded(config, plan)
        for sentence in left_notes(stack, {n: why for n, why in plan.left.items() if why != "skipped"}):
            logger.warning("%s", sentence)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is a matrix to quantize."""
        module, _, key = param_name.rpartition(".")
        return not self.pre_quantized and key == "weight" and module in self.quantization_config.modules

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a matrix while it is loaded."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, loaded: bool = True, **kwargs: Any) -> None:
        for name in self.quantization_config.modules:
            module = model.get_submodule(name)
            if not self.pre_quantized and any(p.device.type == "meta" for p in module.parameters()):
                raise ValueError(
                    f"device_map: expected no quantized layer on disk, got {name} there; quantize in memory "
                    "(device_map='cpu'), save, and load the saved model with layers on disk"
                )
            if loaded:
                check_stored(module, name)
            check_range(module, name, self.quantization_config.compute_dtype or model.dtype)
            if module.bits == 4:
                module.bind()
        self.statistics = None
        mark_stored(model)
        keep_names(model, self.quantization_config.modules)
        model.is_loaded_in_4bit = True  # by which PEFT and accelerate recognize quantized layers

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors, and the marker that makes loading without this package fail with an instruction."""
        return {**model.state_dict(), **signs()}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained makes it a string
        if any(getattr(getattr(module, "base_layer", None), "bits", None) == 4 for module in model.modules()):
            raise ValueError(
                "model: expected no adapters on 4-bit layers, got some, which could not be merged afterwards; save "
                "them, dequantize the model without them, and load them on it"
            )
        for name, module in [*model.named_modules()]:
            if is_quantized(module):
                replace_module(model, name, to_linear(module, dtype))
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
        """Each matrix is one operator for torch.compile."""
        return True


class _Quantize(ConversionOps):
    """Converts a matrix of the checkpoint to codes and scales."""

    def __init__(self, quantizer: OwlBnbQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """See the class."""
        config = self.quantizer.quantization_config
        result: dict[str, Any] = {}
        for key, value in input_dict.items():
            W = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            module = model.get_submodule(name)
            W = W.mT if module.was_transposed else W
            if W.shape != (module.out_features, module.in_features):
                expected = f"({module.out_features}, {module.in_features})"
                raise ValueError(f"{name}: expected a matrix {expected}, got {tuple(W.shape)}")
            statistics = self.quantizer.statistics
            squares = None if statistics is None else statistics.of(name)
            tensors = round_matrix(W, module.bits, config, name, squares)
            result |= {f"{name}.{part}": nn.Parameter(t, requires_grad=False) for part, t in tensors.items()}
        return result


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of this package."""
    return isinstance(module, nn.Linear) and hasattr(module, "scales") and hasattr(module, "bits")


def _modules_of(model: Any, modules: dict[str, int]) -> dict[str, int]:
    """The modules of a checkpoint, by their names in this model.

    Raises:
        ValueError: there are none, or one is not a matrix of the model.
    """
    if not modules:
        raise ValueError("modules: expected the names of the quantized matrices, got none; config.json is damaged")
    places = names_in(model, modules)
    for name, place in places.items():
        if not is_linear(model.get_submodule(place)):
            raise ValueError(f"modules: expected matrices of {type(model).__name__}, got {name!r}")
    return {place: modules[name] for name, place in places.items()}


def to_linear(module: Any, dtype: torch.dtype | None) -> nn.Module:
    """A dense Linear, or Conv1D, with the decoded weights; the bias is shared."""
    return new_matrix(module.unpack(dtype), module.bias, module.was_transposed).train(module.training)


def check_stored(module: Any, name: str) -> None:
    """Checks that a module's tensors were loaded and that its scales are finite. Shapes are checked by transformers,
    and each code is valid.

    Raises:
        ValueError: a missing tensor, one of another dtype, NaN or infinity; begins with the module's name.
    """
    for key, tensor in module.named_parameters():
        # Transformers marks loaded tensors; a tensor that the checkpoint lacks is unmarked, with undefined contents.
        if key != "bias" and tensor.device.type != "meta" and not hasattr(tensor, "_is_hf_initialized"):
            raise ValueError(f"{name}.{key}: expected it in the checkpoint, got none; the file is damaged")
    whole = module.scales.double_quant
    expected = {"weight": torch.uint8, "scales.absmax": torch.uint8 if whole else torch.float32}
    for key, tensor in module.named_parameters():
        if key == "bias" or tensor.device.type == "meta":
            continue
        wanted = expected.get(key, torch.float32)
        if tensor.dtype != wanted:
            raise ValueError(f"{name}.{key}: expected {wanted}, got {tensor.dtype}; the file is damaged")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}.{key}: expected finite numbers, got NaN or infinity; the file is damaged")


def check_range(module: Any, name: str, dtype: torch.dtype) -> None:
    """Checks that decoded weights are finite in the compute dtype.

    Raises:
        ValueError: the dtype is float16, and a scale exceeds its largest number.
    """
    from hf_cod.compression.quantization.bnb_decoding import dequantize_scales

    if dtype != torch.float16 or module.scales.absmax.device.type == "meta":
        return
    largest = float(dequantize_scales(*module.scales()).abs().max())
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"dtype: expected one that holds weights of {largest:g} in {name}, got {dtype}; use bfloat16")
