"""The table of base families: each of our classes beside the class of transformers that has the same parameters."""

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .configuration_cod_llama import CodLlamaConfig
from .configuration_cod_mistral import CodMistralConfig
from .configuration_cod_olmo import CodOlmoConfig
from .configuration_cod_olmo2 import CodOlmo2Config
from .configuration_cod_qwen2 import CodQwen2Config
from .configuration_cod_qwen3 import CodQwen3Config
from .configuration_cod_vit import CodViTConfig
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


@dataclass(frozen=True)
class Family:
    """One base family.

    Args:
        config: Our configuration class.
        stock_config: The configuration class of transformers.
        models: Auto class -> our model class. The class of transformers has the same name without "Cod"; a few do
            not exist.
        absorbers: Modules of a layer whose weights can take over a factor on the outputs of the norms before the
            sublayers: those norms, or where these have no weights, the Linears that read them.
        foldable: The placements whose function a stock model of the family has.
    """

    config: Any
    stock_config: Any
    models: dict[Any, type[PreTrainedModel]]
    absorbers: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    foldable: tuple[str, ...] = ("pre", "scaled_init", "lns")

    @property
    def model_type(self) -> str:
        """The `model_type` of our configuration."""
        return self.config.model_type

    def stock_class(self, name: str) -> type[PreTrainedModel] | None:
        """The class of transformers beside our class `name`, or None where transformers has none."""
        return getattr(transformers, name.removeprefix("Cod"), None)

    def our_class(self, name: str) -> type[PreTrainedModel] | None:
        """Our class beside the class `name` of transformers, or None where we have none."""
        ours = {model.__name__: model for model in self.models.values()}
        return ours.get(f"Cod{name}")


def _text_models(*models: type[PreTrainedModel]) -> dict[Any, type[PreTrainedModel]]:
    autos = (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    )
    return dict(zip(autos, models, strict=True))


FAMILIES: tuple[Family, ...] = (
    Family(
        CodLlamaConfig,
        transformers.LlamaConfig,
        _text_models(
            CodLlamaModel,
            CodLlamaForCausalLM,
            CodLlamaForSequenceClassification,
            CodLlamaForTokenClassification,
            CodLlamaForQuestionAnswering,
        ),
    ),
    Family(
        CodQwen2Config,
        transformers.Qwen2Config,
        _text_models(
            CodQwen2Model,
            CodQwen2ForCausalLM,
            CodQwen2ForSequenceClassification,
            CodQwen2ForTokenClassification,
            CodQwen2ForQuestionAnswering,
        ),
    ),
    Family(
        CodQwen3Config,
        transformers.Qwen3Config,
        _text_models(
            CodQwen3Model,
            CodQwen3ForCausalLM,
            CodQwen3ForSequenceClassification,
            CodQwen3ForTokenClassification,
            CodQwen3ForQuestionAnswering,
        ),
    ),
    Family(
        CodMistralConfig,
        transformers.MistralConfig,
        _text_models(
            CodMistralModel,
            CodMistralForCausalLM,
            CodMistralForSequenceClassification,
            CodMistralForTokenClassification,
            CodMistralForQuestionAnswering,
        ),
    ),
    Family(
        CodOlmoConfig,
        transformers.OlmoConfig,
        _text_models(
            CodOlmoModel,
            CodOlmoForCausalLM,
            CodOlmoForSequenceClassification,
            CodOlmoForTokenClassification,
            CodOlmoForQuestionAnswering,
        ),
        absorbers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    ),
    Family(
        CodOlmo2Config,
        transformers.Olmo2Config,
        _text_models(
            CodOlmo2Model,
            CodOlmo2ForCausalLM,
            CodOlmo2ForSequenceClassification,
            CodOlmo2ForTokenClassification,
            CodOlmo2ForQuestionAnswering,
        ),
        foldable=("reordered",),
    ),
    Family(
        CodViTConfig,
        transformers.ViTConfig,
        {AutoModel: CodViTModel, AutoModelForImageClassification: CodViTForImageClassification},
        absorbers=("layernorm_before", "layernorm_after"),
    ),
)


def register() -> None:
    """Teach the Auto classes of transformers our model types; calling it again changes nothing."""
    for family in FAMILIES:
        AutoConfig.register(family.model_type, family.config, exist_ok=True)
        for auto, model in family.models.items():
            auto.register(family.config, model, exist_ok=True)
