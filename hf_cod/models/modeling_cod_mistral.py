"""Models of Mistral with a choice of norm placement; `configuration_cod_mistral.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)

from .configuration_cod_mistral import CodMistralConfig
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodMistralDecoderLayer(PlacedDecoderLayer, MistralDecoderLayer):
    """One layer: Mistral's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CodMistralPreTrainedModel(PlacedPreTrainedModel, MistralPreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodMistralConfig
    _no_split_modules: ClassVar[list[str]] = ["CodMistralDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodMistralDecoderLayer,
        "attentions": MistralAttention,
    }


class CodMistralModel(PlacedDecoder, CodMistralPreTrainedModel, MistralModel):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodMistralDecoderLayer
    rotary_class = MistralRotaryEmbedding


class CodMistralForCausalLM(CausalLMHead, CodMistralPreTrainedModel, MistralForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodMistralModel


class CodMistralForSequenceClassification(SequenceClassificationHead, CodMistralPreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodMistralModel


class CodMistralForTokenClassification(TokenClassificationHead, CodMistralPreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodMistralModel


class CodMistralForQuestionAnswering(QuestionAnsweringHead, CodMistralPreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodMistralModel


CodMistralModel.register_for_auto_class("AutoModel")
CodMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodMistralForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodMistralForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodMistralForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
