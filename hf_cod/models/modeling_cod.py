"""Common parts of the models of all families: a layer with a norm placement, a stack of such layers, and the heads.

Every class here is a mixin before a class of transformers, whose attention, MLP, norm, rotary embedding, masks, caches
and forward methods stay in use. Only constructors are replaced, because those of transformers name their layer class in
the code.
"""

# mypy does not see the attributes that a mixin uses of the class after it.
# mypy: disable-error-code="misc, arg-type, assignment, attr-defined, call-arg"
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .configuration_cod import check_placement
from .modifiers import LAYER_SCALES, ActivationScaling, LayerScale
from .placements import PLACEMENTS, LayerNormScaling, NormPlacement, Sublayer
from .shapes import ShapedModel


class PlacedLayer:
    """Mixin for a decoder or encoder layer: builds the norms that the placement needs and runs them in its order."""

    placement: NormPlacement
    # None without LayerScale.
    attention_scale: LayerScale | None
    mlp_scale: LayerScale | None
    build_norm: ClassVar[Any]  # static method of each family: config -> a new norm over the hidden size
    # Name of a norm in the placements -> its name in the family's own checkpoints, if it differs.
    norm_names: ClassVar[dict[str, str]] = {}

    def place_norms(self, config: Any, layer: int) -> None:
        """Set the layer's placement, build exactly its norms and modifiers, and set the standard deviations of
        initialisation.
        """
        self.placement = PLACEMENTS[config.norm_placement](config, layer)
        # The layer of the family comes with the norms of its own placement.
        needed = [self.norm_names.get(name, name) for name in self.placement.norms]
        for name in [name for name, _ in self.named_children() if "norm" in name]:
            if name not in needed:
                delattr(self, name)
        for name in needed:
            if not hasattr(self, name):
                setattr(self, name, self.build_norm(config))
        if config.gpas:
            self.activation_scaling = ActivationScaling()
        for name in LAYER_SCALES:
            initial = config.layer_scale
            setattr(self, name, None if initial is None else LayerScale(config.hidden_size, initial))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # On the Linear itself: transformers initialises modules of remote code only where they own parameters.
                leaf = name.rsplit(".", 1)[-1]
                module.initial_std = self.placement.initial_std(leaf, module, config.initializer_range)

    def run(self, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """The output of the layer for the residual stream `x`; with LayerScale on both sublayers if it has that."""
        if self.attention_scale is not None and self.mlp_scale is not None:
            by_attention, by_mlp = self.attention_scale, self.mlp_scale
            return self.placement.forward(self, x, lambda y: by_attention(attention(y)), lambda y: by_mlp(mlp(y)))
        return self.placement.forward(self, x, attention, mlp)


class PlacedDecoderLayer(PlacedLayer):
    """Mixin for the decoder layers of language models."""

    self_attn: Any
    mlp: Any

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.place_norms(config, layer_idx)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Residual stream (batch, tokens, hidden) in and out; other arguments are passed to the attention."""

        def attention(x: torch.Tensor) -> torch.Tensor:
            return self.self_attn(hidden_states=x, attention_mask=attention_mask, **kwargs)[0]

        return self.run(hidden_states, attention, self.mlp)


def placements_of(model: Any) -> list[NormPlacement]:
    """The norm placement of each layer.

    Raises:
        ValueError: If a layer has none, or another one than the config: the saved model would compute another function
            after loading.
    """
    placements, named = [], model.config.norm_placement
    for layer in model.base_model.layers:
        placement = getattr(layer, "placement", None)
        if not isinstance(placement, NormPlacement):
            raise ValueError(f"layers: expected layers with a norm placement, got {type(layer).__name__}")
        if placement.name != named:
            raise ValueError(
                f"norm_placement: expected {placement.name!r}, as the layers were built, got {named!r}; build a new "
                "model for another placement"
            )
        placements.append(placement)
    return placements


class PlacedPreTrainedModel(ShapedModel):
    """Mixin for the base class of a family: initialisation and saving."""

    config: Any

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ActivationScaling):
            init.zeros_(module.gate)
            return
        if isinstance(module, LayerScale):
            init.constant_(module.weight, module.initial)
            return
        std = getattr(module, "initial_std", None)
        if std is None:
            super()._init_weights(module)
            return
        init.normal_(module.weight, mean=0.0, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)

    def set_lns_exponent(self, exponent: float) -> None:
        """Set the exponent of LNS in all layers and in the config, from 0 (no factors) to 1; the paper's is 1/2.

        Raises:
            ValueError: If the placement has no such factors, or for another number.
        """
        before = self.config.lns_exponent
        self.config.lns_exponent = exponent
        try:
            check_placement(self.config)
        except ValueError:
            self.config.lns_exponent = before
            raise
        for placement in placements_of(self):
            if isinstance(placement, LayerNormScaling):
                placement.set_exponent(exponent)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with everything that is required to load the model without this package.

        These are the files that the config saves, and the depths of the layers if some were removed.

        Raises:
            ValueError: If there are layers without a norm placement, with another one than the config, or from models
                of different depth.
        """
        self._record_depths()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _record_depths(self) -> None:
        """Write the depths of the layers to the config; the layers are up to date, whichever code removed some."""
        placements = placements_of(self)
        depths = [placement.depth for placement in placements]
        totals = sorted({placement.n_layers for placement in placements})
        if len(totals) != 1:
            raise ValueError(
                f"layers: expected layers from models of one depth, got layers from models of {totals} layers"
            )
        n_layers = totals[0]
        untouched = n_layers == len(depths) and depths == list(range(n_layers))
        self.config.layer_depths = None if untouched else depths
        self.config.original_num_hidden_layers = None if untouched else n_layers


class PlacedDecoder:
    """Mixin for the base models: embeddings, layers, final norm, rotary embedding; forward is the family's own."""

    layer_class: ClassVar[Any]  # called with the config and the index of the layer
    rotary_class: ClassVar[Any]

    def __init__(self, config: Any):
        check_placement(config)
        PreTrainedModel.__init__(self, config)  # not the family's own: see the file's top
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.layer_class(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = self.layer_class.build_norm(config)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        # Read by the forward of the families that can mix full and sliding attention.
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.post_init()


class CausalLMHead:
    """Mixin for language models."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SequenceClassificationHead(GenericForSequenceClassification):
    """Mixin for sequence classification; the constructor of transformers uses AutoModel, which loads no remote code."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class TokenClassificationHead(GenericForTokenClassification):
    """Mixin for token classification; see `SequenceClassificationHead`."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class QuestionAnsweringHead(GenericForQuestionAnswering):
    """Mixin for extractive question answering; see `SequenceClassificationHead`."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
