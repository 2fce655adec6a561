"""Models of Llama with a choice of norm placement; `configuration_cod_llama.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_cod_llama import CodLlamaConfig
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodLlamaDecoderLayer(PlacedDecoderLayer, LlamaDecoderLayer):
    """One layer: Llama's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CodLlamaPreTrainedModel(PlacedPreTrainedModel, LlamaPreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodLlamaConfig
    _no_split_modules: ClassVar[list[str]] = ["CodLlamaDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodLlamaDecoderLayer,
        "attentions": LlamaAttention,
    }


class CodLlamaModel(PlacedDecoder, CodLlamaPreTrainedModel, LlamaModel):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodLlamaDecoderLayer
    rotary_class = LlamaRotaryEmbedding


class CodLlamaForCausalLM(CausalLMHead, CodLlamaPreTrainedModel, LlamaForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodLlamaModel


class CodLlamaForSequenceClassification(SequenceClassificationHead, CodLlamaPreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodLlamaModel


class CodLlamaForTokenClassification(TokenClassificationHead, CodLlamaPreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodLlamaModel


class CodLlamaForQuestionAnswering(QuestionAnsweringHead, CodLlamaPreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodLlamaModel


CodLlamaModel.register_for_auto_class("AutoModel")
CodLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodLlamaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodLlamaForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodLlamaForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
