"""Models of Qwen3 with a choice of norm placement; `configuration_cod_qwen3.py` names the choices."""

# Mixins that narrow what classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

from torch import nn
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from .configuration_cod_qwen3 import CodQwen3Config
from .modeling_cod import (
    CausalLMHead,
    PlacedDecoder,
    PlacedDecoderLayer,
    PlacedPreTrainedModel,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)


class CodQwen3DecoderLayer(PlacedDecoderLayer, Qwen3DecoderLayer):
    """One layer: Qwen3's attention and MLP, joined by the placement of the config."""

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CodQwen3PreTrainedModel(PlacedPreTrainedModel, Qwen3PreTrainedModel):
    """Initialisation, saving and the properties that transformers looks up by class."""

    config: CodQwen3Config
    _no_split_modules: ClassVar[list[str]] = ["CodQwen3DecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CodQwen3DecoderLayer,
        "attentions": Qwen3Attention,
    }


class CodQwen3Model(PlacedDecoder, CodQwen3PreTrainedModel, Qwen3Model):
    """The stack without a head: tokens (batch, tokens) -> hidden states (batch, tokens, hidden)."""

    layer_class = CodQwen3DecoderLayer
    rotary_class = Qwen3RotaryEmbedding


class CodQwen3ForCausalLM(CausalLMHead, CodQwen3PreTrainedModel, Qwen3ForCausalLM):
    """Language model: tokens (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    model_class = CodQwen3Model


class CodQwen3ForSequenceClassification(SequenceClassificationHead, CodQwen3PreTrainedModel):
    """One label for each sequence, read at its last token: logits (batch, labels)."""

    model_class = CodQwen3Model


class CodQwen3ForTokenClassification(TokenClassificationHead, CodQwen3PreTrainedModel):
    """One label for each token: logits (batch, tokens, labels)."""

    model_class = CodQwen3Model


class CodQwen3ForQuestionAnswering(QuestionAnsweringHead, CodQwen3PreTrainedModel):
    """Start and end of an answer: two logits (batch, tokens)."""

    model_class = CodQwen3Model


CodQwen3Model.register_for_auto_class("AutoModel")
CodQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CodQwen3ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CodQwen3ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
CodQwen3ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
