"""Models of OLMo with a choice of norm placement; `configuration_cod_olmo.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.olmo.modeling_olmo import (
    OlmoAttention,
    OlmoDecoderLayer,
    OlmoForCausalLM,
    OlmoLayerNorm,
    OlmoModel,
    OlmoPreTrainedModel,
    OlmoRotaryEmbedding,
)

from .configuration_cod_olmo import CodOlmoConfig
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodOlmoDecoderLayer(PlacedDecoderLayer, OlmoDecoderLayer):
    """One layer: OLMo's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return OlmoLayerNorm(config.hidden_size)


class CodOlmoPreTrainedModel(PlacedPreTrainedModel, OlmoPreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodOlmoConfig
    _no_split_modules: ClassVar[list[str]] = ["CodOlmoDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodOlmoDecoderLayer,
        "attentions": OlmoAttention,
    }


class CodOlmoModel(PlacedDecoder, CodOlmoPreTrainedModel, OlmoModel):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodOlmoDecoderLayer
    rotary_class = OlmoRotaryEmbedding


class CodOlmoForCausalLM(CausalLMHead, CodOlmoPreTrainedModel, OlmoForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodOlmoModel


class CodOlmoForSequenceClassification(SequenceClassificationHead, CodOlmoPreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodOlmoModel


class CodOlmoForTokenClassification(TokenClassificationHead, CodOlmoPreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodOlmoModel


class CodOlmoForQuestionAnswering(QuestionAnsweringHead, CodOlmoPreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodOlmoModel


CodOlmoModel.register_for_auto_class("AutoModel")
CodOlmoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodOlmoForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodOlmoForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodOlmoForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
