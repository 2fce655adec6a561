"""Models whose norms stand where you want them: a configuration field instead of a fork.

The files `placements.py`, `shapes.py`, `configuration_*.py` and `modeling_*.py` are copied beside the weights of every
saved model, flat, and loaded from there by people without this package. So they import torch, transformers and each
other (`from .x import y`) and nothing else.
"""

from .configuration_cod_llama import CodLlamaConfig
from .configuration_cod_mistral import CodMistralConfig
from .configuration_cod_olmo import CodOlmoConfig
from .configuration_cod_olmo2 import CodOlmo2Config
from .configuration_cod_qwen2 import CodQwen2Config
from .configuration_cod_qwen3 import CodQwen3Config
from .configuration_cod_vit import CodViTConfig
from .convert import AUTHORS_NORM_TYPES, fold_lns, from_authors, to_lns
from .families import FAMILIES, Family, register
from .modeling_cod_llama import (
    CodLlamaForCausalLM,
    CodLlamaForQuestionAnswering,
    CodLlamaForSequenceClassification,
    CodLlamaForTokenClassification,
    CodLlamaModel,
)
from .modeling_cod_mistral import (
    CodMistralForCausalLM,
    CodMistralForQuestionAnswering,
    CodMistralForSequenceClassification,
    CodMistralForTokenClassification,
    CodMistralModel,
)
from .modeling_cod_olmo import (
    CodOlmoForCausalLM,
    CodOlmoForQuestionAnswering,
    CodOlmoForSequenceClassification,
    CodOlmoForTokenClassification,
    CodOlmoModel,
)
from .modeling_cod_olmo2 import (
    CodOlmo2ForCausalLM,
    CodOlmo2ForQuestionAnswering,
    CodOlmo2ForSequenceClassification,
    CodOlmo2ForTokenClassification,
    CodOlmo2Model,
)
from .modeling_cod_qwen2 import (
    CodQwen2ForCausalLM,
    CodQwen2ForQuestionAnswering,
    CodQwen2ForSequenceClassification,
    CodQwen2ForTokenClassification,
    CodQwen2Model,
)
from .modeling_cod_qwen3 import (
    CodQwen3ForCausalLM,
    CodQwen3ForQuestionAnswering,
    CodQwen3ForSequenceClassification,
    CodQwen3ForTokenClassification,
    CodQwen3Model,
)
from .modeling_cod_vit import CodViTForImageClassification, CodViTModel
from .placements import PLACEMENTS, NormPlacement
from .presets import LLAMA_PRESETS, llama_preset

__all__ = [
    "AUTHORS_NORM_TYPES",
    "FAMILIES",
    "LLAMA_PRESETS",
    "PLACEMENTS",
    "CodLlamaConfig",
    "CodLlamaForCausalLM",
    "CodLlamaForQuestionAnswering",
    "CodLlamaForSequenceClassification",
    "CodLlamaForTokenClassification",
    "CodLlamaModel",
    "CodMistralConfig",
    "CodMistralForCausalLM",
    "CodMistralForQuestionAnswering",
    "CodMistralForSequenceClassification",
    "CodMistralForTokenClassification",
    "CodMistralModel",
    "CodOlmo2Config",
    "CodOlmo2ForCausalLM",
    "CodOlmo2ForQuestionAnswering",
    "CodOlmo2ForSequenceClassification",
    "CodOlmo2ForTokenClassification",
    "CodOlmo2Model",
    "CodOlmoConfig",
    "CodOlmoForCausalLM",
    "CodOlmoForQuestionAnswering",
    "CodOlmoForSequenceClassification",
    "CodOlmoForTokenClassification",
    "CodOlmoModel",
    "CodQwen2Config",
    "CodQwen2ForCausalLM",
    "CodQwen2ForQuestionAnswering",
    "CodQwen2ForSequenceClassification",
    "CodQwen2ForTokenClassification",
    "CodQwen2Model",
    "CodQwen3Config",
    "CodQwen3ForCausalLM",
    "CodQwen3ForQuestionAnswering",
    "CodQwen3ForSequenceClassification",
    "CodQwen3ForTokenClassification",
    "CodQwen3Model",
    "CodViTConfig",
    "CodViTForImageClassification",
    "CodViTModel",
    "Family",
    "NormPlacement",
    "fold_lns",
    "from_authors",
    "llama_preset",
    "register",
    "to_lns",
]
