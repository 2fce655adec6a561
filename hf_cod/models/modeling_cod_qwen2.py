"""Models of Qwen2 and Qwen2.5 with a choice of norm placement; `configuration_cod_qwen2.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from .configuration_cod_qwen2 import CodQwen2Config
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodQwen2DecoderLayer(PlacedDecoderLayer, Qwen2DecoderLayer):
    """One layer: Qwen2 and Qwen2.5's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CodQwen2PreTrainedModel(PlacedPreTrainedModel, Qwen2PreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodQwen2Config
    _no_split_modules: ClassVar[list[str]] = ["CodQwen2DecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodQwen2DecoderLayer,
        "attentions": Qwen2Attention,
    }


class CodQwen2Model(PlacedDecoder, CodQwen2PreTrainedModel, Qwen2Model):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodQwen2DecoderLayer
    rotary_class = Qwen2RotaryEmbedding


class CodQwen2ForCausalLM(CausalLMHead, CodQwen2PreTrainedModel, Qwen2ForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodQwen2Model


class CodQwen2ForSequenceClassification(SequenceClassificationHead, CodQwen2PreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodQwen2Model


class CodQwen2ForTokenClassification(TokenClassificationHead, CodQwen2PreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodQwen2Model


class CodQwen2ForQuestionAnswering(QuestionAnsweringHead, CodQwen2PreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodQwen2Model


CodQwen2Model.register_for_auto_class("AutoModel")
CodQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodQwen2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodQwen2ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodQwen2ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
