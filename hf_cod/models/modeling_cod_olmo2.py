"""Models of OLMo 2 with a choice of norm placement; `configuration_cod_olmo2.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2DecoderLayer,
    Olmo2ForCausalLM,
    Olmo2Model,
    Olmo2PreTrainedModel,
    Olmo2RMSNorm,
    Olmo2RotaryEmbedding,
)

from .configuration_cod_olmo2 import CodOlmo2Config
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodOlmo2DecoderLayer(PlacedDecoderLayer, Olmo2DecoderLayer):
    """One layer: OLMo 2's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return Olmo2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CodOlmo2PreTrainedModel(PlacedPreTrainedModel, Olmo2PreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodOlmo2Config
    _no_split_modules: ClassVar[list[str]] = ["CodOlmo2DecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodOlmo2DecoderLayer,
        "attentions": Olmo2Attention,
    }


class CodOlmo2Model(PlacedDecoder, CodOlmo2PreTrainedModel, Olmo2Model):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodOlmo2DecoderLayer
    rotary_class = Olmo2RotaryEmbedding


class CodOlmo2ForCausalLM(CausalLMHead, CodOlmo2PreTrainedModel, Olmo2ForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodOlmo2Model


class CodOlmo2ForSequenceClassification(SequenceClassificationHead, CodOlmo2PreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodOlmo2Model


class CodOlmo2ForTokenClassification(TokenClassificationHead, CodOlmo2PreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodOlmo2Model


class CodOlmo2ForQuestionAnswering(QuestionAnsweringHead, CodOlmo2PreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodOlmo2Model


CodOlmo2Model.register_for_auto_class("AutoModel")
CodOlmo2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodOlmo2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodOlmo2ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodOlmo2ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
