"""Models of the Vision Transformer with a choice of norm placement; `configuration_cod_vit.py` names the choices."""

# Mixins narrow types that classes of transformers declare.
# mypy: disable-error-code="misc"
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
)

from .configuration_cod import check_placement
from .configuration_cod_vit import CodViTConfig
from .modeling_cod import PlacedLayer, PlacedPreTrainedModel


class CodViTLayer(PlacedLayer, ViTLayer):
    """One layer: ViT's attention and MLP, with the norm placement of the config.

    ViT checkpoints call the norms before the sublayers `layernorm_before` and `layernorm_after`; so does this layer.
    The placements use the names of Llama, which are properties here.
    """

    norm_names: ClassVar[dict[str, str]] = {
        "input_layernorm": "layernorm_before",
        "post_attention_layernorm": "layernorm_after",
    }

    def __init__(self, config: Any, layer: int):
        super().__init__(config)
        self.place_norms(config, layer)

    @staticmethod
    def build_norm(config: Any) -> nn.Module:
        """A new norm over the hidden size."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def input_layernorm(self) -> nn.Module:
        """The norm before the attention."""
        return self.layernorm_before

    @property
    def post_attention_layernorm(self) -> nn.Module:
        """The norm before the MLP, or on the attention's output, depending on the placement."""
        return self.layernorm_after

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Residual stream (batch, patches + 1, hidden) in and out; other arguments are passed to the attention."""

        def attention(x: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.attention(x, attention_mask, **kwargs)[0])

        def mlp(x: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.mlp(x))

        return self.run(hidden_states, attention, mlp)


class CodViTPreTrainedModel(PlacedPreTrainedModel, ViTPreTrainedModel):
    """Initialisation, saving, and class attributes that transformers reads."""

    config: CodViTConfig
    _no_split_modules: ClassVar[list[str]] = ["ViTEmbeddings", "CodViTLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": CodViTLayer, "attentions": ViTAttention}


class CodViTModel(CodViTPreTrainedModel, ViTModel):
    """The encoder: pixels (batch, channels, height, width) -> hidden states (batch, patches + 1, hidden)."""

    def __init__(self, config: Any, add_pooling_layer: bool = True, use_mask_token: bool = False):
        check_placement(config)
        PreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([CodViTLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class CodViTForImageClassification(CodViTPreTrainedModel, ViTForImageClassification):
    """One label for each image, read at the class token: logits (batch, labels)."""

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = CodViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()


CodViTModel.register_for_auto_class("AutoModel")
CodViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
