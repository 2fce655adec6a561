"""Models with a choice of norm placement, set by a configuration field.

The files `placements.py`, `modifiers.py`, `shapes.py`, `factors.py`, `expert_parameters.py`, `configuration_*.py` and
`modeling_*.py` are copied next to the weights of every saved model, into one folder, and loaded from there by users
without this package. Therefore they import only torch, transformers and each other (`from .x import y`).

Each `configuration_X.py` and its `modeling_X.py` import each other. These eight import cycles are required: a model
file imports its configuration, and when transformers saves a configuration alone, it copies the files that its relative
imports name. So a configuration names its model file in an import that never runs (`if TYPE_CHECKING:`); without it the
saved code would lack the models. `configuration_shaped.py` imports the heads of a family from its model file when it
saves.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .authors import AUTHORS_NORM_TYPES as AUTHORS_NORM_TYPES
    from .configuration_cod_llama import CodLlamaConfig as CodLlamaConfig
    from .configuration_cod_mistral import CodMistralConfig as CodMistralConfig
    from .configuration_cod_olmo import CodOlmoConfig as CodOlmoConfig
    from .configuration_cod_olmo2 import CodOlmo2Config as CodOlmo2Config
    from .configuration_cod_qwen2 import CodQwen2Config as CodQwen2Config
    from .configuration_cod_qwen3 import CodQwen3Config as CodQwen3Config
    from .configuration_cod_vit import CodViTConfig as CodViTConfig
    from .convert import fold_lns as fold_lns
    from .convert import from_authors as from_authors
    from .convert import to_gpas as to_gpas
    from .convert import to_layer_scale as to_layer_scale
    from .convert import to_lns as to_lns
    from .families import FAMILIES as FAMILIES
    from .families import Family as Family
    from .families import register as register
    from .modeling_cod_llama import CodLlamaForCausalLM as CodLlamaForCausalLM
    from .modeling_cod_llama import CodLlamaForQuestionAnswering as CodLlamaForQuestionAnswering
    from .modeling_cod_llama import CodLlamaForSequenceClassification as CodLlamaForSequenceClassification
    from .modeling_cod_llama import CodLlamaForTokenClassification as CodLlamaForTokenClassification
    from .modeling_cod_llama import CodLlamaModel as CodLlamaModel
    from .modeling_cod_mistral import CodMistralForCausalLM as CodMistralForCausalLM
    from .modeling_cod_mistral import CodMistralForQuestionAnswering as CodMistralForQuestionAnswering
    from .modeling_cod_mistral import CodMistralForSequenceClassification as CodMistralForSequenceClassification
    from .modeling_cod_mistral import CodMistralForTokenClassification as CodMistralForTokenClassification
    from .modeling_cod_mistral import CodMistralModel as CodMistralModel
    from .modeling_cod_olmo import CodOlmoForCausalLM as CodOlmoForCausalLM
    from .modeling_cod_olmo import CodOlmoForQuestionAnswering as CodOlmoForQuestionAnswering
    from .modeling_cod_olmo import CodOlmoForSequenceClassification as CodOlmoForSequenceClassification
    from .modeling_cod_olmo import CodOlmoForTokenClassification as CodOlmoForTokenClassification
    from .modeling_cod_olmo import CodOlmoModel as CodOlmoModel
    from .modeling_cod_olmo2 import CodOlmo2ForCausalLM as CodOlmo2ForCausalLM
    from .modeling_cod_olmo2 import CodOlmo2ForQuestionAnswering as CodOlmo2ForQuestionAnswering
    from .modeling_cod_olmo2 import CodOlmo2ForSequenceClassification as CodOlmo2ForSequenceClassification
    from .modeling_cod_olmo2 import CodOlmo2ForTokenClassification as CodOlmo2ForTokenClassification
    from .modeling_cod_olmo2 import CodOlmo2Model as CodOlmo2Model
    from .modeling_cod_qwen2 import CodQwen2ForCausalLM as CodQwen2ForCausalLM
    from .modeling_cod_qwen2 import CodQwen2ForQuestionAnswering as CodQwen2ForQuestionAnswering
    from .modeling_cod_qwen2 import CodQwen2ForSequenceClassification as CodQwen2ForSequenceClassification
    from .modeling_cod_qwen2 import CodQwen2ForTokenClassification as CodQwen2ForTokenClassification
    from .modeling_cod_qwen2 import CodQwen2Model as CodQwen2Model
    from .modeling_cod_qwen3 import CodQwen3ForCausalLM as CodQwen3ForCausalLM
    from .modeling_cod_qwen3 import CodQwen3ForQuestionAnswering as CodQwen3ForQuestionAnswering
    from .modeling_cod_qwen3 import CodQwen3ForSequenceClassification as CodQwen3ForSequenceClassification
    from .modeling_cod_qwen3 import CodQwen3ForTokenClassification as CodQwen3ForTokenClassification
    from .modeling_cod_qwen3 import CodQwen3Model as CodQwen3Model
    from .modeling_cod_vit import CodViTForImageClassification as CodViTForImageClassification
    from .modeling_cod_vit import CodViTModel as CodViTModel
    from .placements import PLACEMENTS as PLACEMENTS
    from .placements import NormPlacement as NormPlacement
    from .presets import LLAMA_PRESETS as LLAMA_PRESETS
    from .presets import llama_preset as llama_preset

# File -> its public names, imported when one is first used: transformers' models take seconds.
_NAMES = {
    "configuration_cod_llama": ("CodLlamaConfig",),
    "configuration_cod_mistral": ("CodMistralConfig",),
    "configuration_cod_olmo": ("CodOlmoConfig",),
    "configuration_cod_olmo2": ("CodOlmo2Config",),
    "configuration_cod_qwen2": ("CodQwen2Config",),
    "configuration_cod_qwen3": ("CodQwen3Config",),
    "configuration_cod_vit": ("CodViTConfig",),
    "authors": ("AUTHORS_NORM_TYPES",),
    "convert": (
        "fold_lns",
        "from_authors",
        "to_gpas",
        "to_layer_scale",
        "to_lns",
    ),
    "families": (
        "FAMILIES",
        "Family",
        "register",
    ),
    "modeling_cod_llama": (
        "CodLlamaForCausalLM",
        "CodLlamaForQuestionAnswering",
        "CodLlamaForSequenceClassification",
        "CodLlamaForTokenClassification",
        "CodLlamaModel",
    ),
    "modeling_cod_mistral": (
        "CodMistralForCausalLM",
        "CodMistralForQuestionAnswering",
        "CodMistralForSequenceClassification",
        "CodMistralForTokenClassification",
        "CodMistralModel",
    ),
    "modeling_cod_olmo": (
        "CodOlmoForCausalLM",
        "CodOlmoForQuestionAnswering",
        "CodOlmoForSequenceClassification",
        "CodOlmoForTokenClassification",
        "CodOlmoModel",
    ),
    "modeling_cod_olmo2": (
        "CodOlmo2ForCausalLM",
        "CodOlmo2ForQuestionAnswering",
        "CodOlmo2ForSequenceClassification",
        "CodOlmo2ForTokenClassification",
        "CodOlmo2Model",
    ),
    "modeling_cod_qwen2": (
        "CodQwen2ForCausalLM",
        "CodQwen2ForQuestionAnswering",
        "CodQwen2ForSequenceClassification",
        "CodQwen2ForTokenClassification",
        "CodQwen2Model",
    ),
    "modeling_cod_qwen3": (
        "CodQwen3ForCausalLM",
        "CodQwen3ForQuestionAnswering",
        "CodQwen3ForSequenceClassification",
        "CodQwen3ForTokenClassification",
        "CodQwen3Model",
    ),
    "modeling_cod_vit": (
        "CodViTForImageClassification",
        "CodViTModel",
    ),
    "placements": (
        "PLACEMENTS",
        "NormPlacement",
    ),
    "presets": (
        "LLAMA_PRESETS",
        "llama_preset",
    ),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for file, names in _NAMES.items():
        if name in names:
            value = getattr(import_module(f".{file}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
