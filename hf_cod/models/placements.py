"""Norm placements of a transformer layer: one small class for each placement, and the table of all of them.

Symbols: x the residual stream (batch, tokens, hidden), F a sublayer (attention or MLP), LN the norm of the family
(RMSNorm or LayerNorm), l the layer counted from 1 as papers do, N the number of layers, W a weight matrix.
The names of the norms are those of Llama checkpoints and of the authors' checkpoints.

This file is saved with every model and uploaded to the Hub, so it imports only torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

Sublayer = Callable[[torch.Tensor], torch.Tensor]

# Exponent of l in LayerNorm Scaling.
LNS_EXPONENT = 0.5

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH_NORMS = ("input_layernorm", "pre_feedforward_layernorm", *OUTPUT_NORMS)

# The last parts of the names of a layer's Linears, by their role in initialisation.
RESIDUAL_PROJECTIONS = ("o_proj", "down_proj", "fc2")
QUERY_AND_KEY = ("q_proj", "k_proj")


def layer_depth(config: Any, layer: int) -> tuple[int, int]:
    """The index (from 0) and the number of layers that the formulas use for a layer.

    Both differ from the layer's index in the stack only if layers were removed or repeated after training: then the
    config lists the original indices in `layer_depths` and the original number in `original_num_hidden_layers`.
    """
    depth = layer if config.layer_depths is None else config.layer_depths[layer]
    n_layers = config.original_num_hidden_layers
    return depth, config.num_hidden_layers if n_layers is None else n_layers


def depth_factor(depth: int, exponent: float) -> float:
    """l ** -exponent of the layer with index `depth`, l = depth + 1."""
    return 1.0 / math.sqrt(depth + 1) if exponent == LNS_EXPONENT else (depth + 1) ** -exponent


class NormPlacement(ABC):
    """The order in which one layer applies its norms, its two sublayers and the residual addition.

    Each layer holds its own object. Numbers that depend on the depth are Python floats on it, not buffers:
    initialisation from the meta device erases buffers, and casts to bfloat16 round them.
    """

    norms: ClassVar[tuple[str, ...]]
    # Factor on the outputs of the norms before the sublayers, and on the outputs of the sublayers.
    scale: float = 1.0
    output_scale: float = 1.0

    def __init__(self, config: Any, layer: int):
        self.name: str = config.norm_placement
        self.depth, self.n_layers = layer_depth(config, layer)
        self.scaled_residual_init: bool = config.scaled_residual_init
        self.gpas: bool = config.gpas

    def gated(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """x by the layer's `ActivationScaling`, if the config asks for GPAS.

        Placements whose norms act on the sum x + F(x) apply it to x in that sum, where the norm does not cancel it; the
        others to the sum. The authors' code does the same.
        """
        return layer.activation_scaling(x) if self.gpas else x

    @abstractmethod
    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """The output of the layer for the residual stream `x`, (batch, tokens, hidden) in and out."""

    def initial_std(self, name: str, linear: nn.Linear, std: float) -> float:
        """Standard deviation of the normal distribution that initialises the weight of the Linear `name`."""
        if self.scaled_residual_init and name in RESIDUAL_PROJECTIONS:
            return std / math.sqrt(2 * self.n_layers)
        return std

    def __repr__(self) -> str:
        return f"{type(self).__name__}(depth={self.depth}, n_layers={self.n_layers})"


class PreNorm(NormPlacement):
    """Pre-LN: x <- x + F(LN(x)).

    Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture" (arXiv 2002.04745), Table 1, right.
    """

    norms = PRE_NORMS

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        x = self.gated(layer, x + attention(layer.input_layernorm(x)))
        return self.gated(layer, x + mlp(layer.post_attention_layernorm(x)))


class ScaledInit(PreNorm):
    """Pre-LN with smaller initial residual projections: std(W_o) = std(W_down) = std / sqrt(2 N).

    Radford et al. 2019 (GPT-2), section 2.3 (2 N residual additions), and Groeneveld et al. 2024 (OLMo,
    arXiv 2402.00838). The function of the layer is that of Pre-LN.
    """

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.scaled_residual_init = True


class LayerNormScaling(NormPlacement):
    """LayerNorm Scaling (LNS): x <- x + F(LN(x) / sqrt(l)), for both norms of layer l, l from 1.

    Sun et al. 2025, "The Curse of Depth in Large Language Models" (arXiv 2502.05795), section 4. Initialise with the
    plain normal distribution: scaled initialisation weakens LNS (the footnote in its abstract). `lns_exponent` of the
    config replaces the exponent 1/2 of l; with 0 this is Pre-LN.
    """

    norms = PRE_NORMS

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.set_exponent(config.lns_exponent)

    def set_exponent(self, exponent: float) -> None:
        """Set the factor to l ** -exponent."""
        self.scale = depth_factor(self.depth, exponent)

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        # The factor is here and not inside the norm, because libraries that replace norms by kernels would drop it.
        x = self.gated(layer, x + attention(layer.input_layernorm(x) * self.scale))
        return self.gated(layer, x + mlp(layer.post_attention_layernorm(x) * self.scale))


class OutputScaling(LayerNormScaling):
    """LNS behind the sublayers: x <- x + F(LN(x)) / sqrt(l), for both sublayers of layer l, l from 1.

    The form that the authors of LNS use for Vision Transformers (arXiv 2502.05795): the input of a sublayer keeps its
    scale, and its contribution to the residual stream is smaller. `lns_exponent` as in LayerNorm Scaling.
    """

    def set_exponent(self, exponent: float) -> None:
        """Set the factor to l ** -exponent."""
        self.output_scale = depth_factor(self.depth, exponent)

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        x = self.gated(layer, x + attention(layer.input_layernorm(x)) * self.output_scale)
        return self.gated(layer, x + mlp(layer.post_attention_layernorm(x)) * self.output_scale)


class PostNorm(NormPlacement):
    """Post-LN: x <- LN(x + F(x)).

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.1. The final norm of the base model
    is kept after the last layer, although its input is normalised already; the paper's equations have no final norm.
    """

    norms = OUTPUT_NORMS

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        x = layer.post_attention_layernorm(self.gated(layer, x) + attention(x))
        return layer.post_feedforward_layernorm(self.gated(layer, x) + mlp(x))


class DeepNorm(NormPlacement):
    """DeepNorm: x <- LN(alpha x + F(x)), alpha = (2 N)^(1/4); gain beta = (8 N)^(-1/4) at initialisation.

    Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers" (arXiv 2203.00555), Figure 2, decoder-only row
    (the encoder-only row has the same formulas). Weights are Xavier normal, std = gain sqrt(2 / (fan_in + fan_out)),
    with gain beta for values, attention output and MLP, and gain 1 for queries and keys.
    `deepnorm_alpha` and `deepnorm_beta` of the config replace the formulas: the code released with the Curse of
    Depth uses alpha = sqrt(8) and beta = (8 N)^(+1/4) at any depth.
    The final norm of the base model is kept after the last layer; the paper's equations have no final norm.
    """

    norms = OUTPUT_NORMS

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        alpha, beta = config.deepnorm_alpha, config.deepnorm_beta
        self.alpha = (2 * self.n_layers) ** 0.25 if alpha is None else float(alpha)
        self.beta = (8 * self.n_layers) ** -0.25 if beta is None else float(beta)

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        # torch.add(F, x, alpha=a) is F + a x in one kernel.
        x = layer.post_attention_layernorm(torch.add(attention(x), self.gated(layer, x), alpha=self.alpha))
        return layer.post_feedforward_layernorm(torch.add(mlp(x), self.gated(layer, x), alpha=self.alpha))

    def initial_std(self, name: str, linear: nn.Linear, std: float) -> float:
        """Xavier's standard deviation with the gains of the class docstring; `std` is not used."""
        gain = 1.0 if name in QUERY_AND_KEY else self.beta
        return gain * math.sqrt(2.0 / (linear.in_features + linear.out_features))


class SandwichNorm(NormPlacement):
    """Sandwich or Peri-LN: x <- x + LN_out(F(LN_in(x))).

    Kim et al. 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture" (arXiv 2502.02732),
    without its optional norm on the embeddings.
    """

    norms = SANDWICH_NORMS

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        x = self.gated(layer, x + layer.post_attention_layernorm(attention(layer.input_layernorm(x))))
        return self.gated(layer, x + layer.post_feedforward_layernorm(mlp(layer.pre_feedforward_layernorm(x))))


class ReorderedNorm(NormPlacement):
    """Reordered norm of OLMo 2: x <- x + LN(F(x)).

    OLMo team 2024, "2 OLMo 2 Furious" (arXiv 2501.00656), paragraph "Reordered norm". The names of the norms are
    those of Post-LN, but the norm is inside the residual branch.
    """

    norms = OUTPUT_NORMS

    def forward(self, layer: Any, x: torch.Tensor, attention: Sublayer, mlp: Sublayer) -> torch.Tensor:
        """See the class."""
        x = self.gated(layer, x + layer.post_attention_layernorm(attention(x)))
        return self.gated(layer, x + layer.post_feedforward_layernorm(mlp(x)))


def n_post_layers(fraction: float, n_layers: int) -> int:
    """ceil(alpha N), the number of Post-LN layers of Mix-LN; tolerates rounding, so that alpha = k / N gives k."""
    return math.ceil(fraction * n_layers - 1e-9)


def mix_norm(config: Any, layer: int) -> NormPlacement:
    """Mix-LN: Post-LN in the first ceil(alpha N) layers, Pre-LN in the rest; alpha = `post_ln_fraction`.

    Li et al. 2024, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN"
    (arXiv 2412.13795). Its models have an integral alpha N (alpha = 0.25 of 12, 24 or 32 layers).
    """
    depth, n_layers = layer_depth(config, layer)
    post = depth < n_post_layers(config.post_ln_fraction, n_layers)
    return PostNorm(config, layer) if post else PreNorm(config, layer)


PLACEMENTS: dict[str, Callable[[Any, int], NormPlacement]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "deepnorm": DeepNorm,
    "scaled_init": ScaledInit,
    "mix": mix_norm,
    "lns": LayerNormScaling,
    "lns_output": OutputScaling,
    "sandwich": SandwichNorm,
    "reordered": ReorderedNorm,
}

# Placements with a factor l ** -exponent.
SCALED = ("lns", "lns_output")
# Placements with which a model may have LayerScale: F(x) is added to x as it is.
LAYER_SCALED = ("pre", "scaled_init", "lns", "lns_output")
