"""`pack_sparse`, and the quantizer by which transformers loads, saves and unpacks packed models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from hf_cod.compression.sparse.checkpoint import check_files
from hf_cod.compression.sparse.config import METHOD, SparseConfig
from hf_cod.compression.sparse.linear import SparseLinear
from hf_cod.compression.sparse.packing import pack_linears
from hf_cod.compression.sparse.settings import PackSettings
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import resolve
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.replacement_modules import ignore_signs, keep_names, names_in, replace, signs
from hf_cod.models.own_config import own_config
from hf_cod.models.stored_config import clear_quantized, mark_stored, unmark_stored


class SparseQuantizer(HfQuantizer):
    """Replaces Linears by SparseLinears before their tensors are loaded, or packs them after loading a dense model."""

    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        mark_stored(model)
        if not self.pre_quantized:
            return
        recorded = self.quantization_config.modules
        files = [path for path in kwargs.get("checkpoint_files") or () if str(path).endswith(".safetensors")]
        check_files(files, recorded)
        emptied = self._emptied()
        places = names_in(model, recorded)
        self.quantization_config.modules = {place: recorded[name] for name, place in places.items()}
        for name, nonzeros in self.quantization_config.modules.items():
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"modules: expected Linears of {type(model).__name__}, got {name!r}")
            if nonzeros > linear.weight.numel():
                most = linear.weight.numel()
                raise ValueError(f"modules: expected at most {most} stored weights of {name!r}, got {nonzeros}")
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            packed = SparseLinear(*sizes, nonzeros=nonzeros, device="meta", dtype=linear.weight.dtype)
            packed._is_hf_initialized = True  # type: ignore[assignment]  # otherwise its weight is made dense to check
            replace(model, name, packed)
        ignore_signs(model, emptied, self._emptied())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        mark_stored(model)
        if not self.pre_quantized:
            self.quantization_config.modules = pack_linears(model, self.quantization_config.min_sparsity)
        else:
            for name in self.quantization_config.modules:
                model.get_submodule(name).check(name)
        keep_names(model, self.quantization_config.modules)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors, and the marker that makes loading without this package fail with an instruction."""
        return {**model.state_dict(), **signs(self._emptied())}, {}

    def _emptied(self) -> str:
        return f"{min(self.quantization_config.modules)}.weight"

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        for name, module in [*model.named_modules()]:
            if isinstance(module, SparseLinear):
                replace(model, name, module.to_linear())
        unmark_stored(model)
        clear_quantized(model)
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # save_pretrained makes it a string

    def is_serializable(self) -> bool:
        """Packed models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on a packed model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Each matrix is one operator for torch.compile."""
        return True


@renamed(minimum="min_sparsity")
@for_one_thread
@checked
def pack_sparse(
    model: PreTrainedModel,
    min_sparsity: float | None = None,
    *,
    settings: PackSettings | None = None,
) -> PreTrainedModel:
    """Stores a model's sparse matrices without their zeros, in place; small batches run faster on CPUs with AVX2.

    Linears in which at least `min_sparsity` is zero become `SparseLinear`. Conv1D (GPT-2), banks of experts and shared
    weights, such as a head tied to the embeddings, are left dense. `save_pretrained` writes the packed form,
    `from_pretrained` reads it where hf_cod is imported, and `model.dequantize()` makes the model dense again.

    Args:
        model: a transformers model in float32 or bfloat16, without adapters. Other dtypes are stored, but not faster.
        min_sparsity: the least share of zeros at which a matrix is packed; default: 0.5. Storage becomes smaller from
            1/16 on in bfloat16; for time, see docs/benchmarks/speed.md.
        settings: `PackSettings`, instead of single fields.

    Returns:
        The same model.

    Raises:
        ValueError: no matrix is sparse enough; the model is quantized, offloaded or has adapters; a weight is NaN or
            infinite (says where).
    """
    least = resolve(pack_sparse, PackSettings, settings, {}, min_sparsity=min_sparsity).min_sparsity
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers model without wrappers, got {type(model).__name__}")
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, SparseQuantizer):
        raise ValueError(f"model: expected plain weights, got quantized ones ({type(quantizer).__name__})")
    config = quantizer.quantization_config if quantizer else SparseConfig(min_sparsity=least)
    config.modules = {**config.modules, **pack_linears(model, least)}
    quantizer = quantizer or SparseQuantizer(config, pre_quantized=True)
    # As set by from_pretrained, so that saving, PEFT and Trainer recognize the model as packed.
    loaded: Any = model
    loaded.hf_quantizer, loaded.is_quantized, loaded.quantization_method = quantizer, True, METHOD
    own_config(model)
    quantizer.postprocess_model(model)
    return model
