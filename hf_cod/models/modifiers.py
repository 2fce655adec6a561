"""Modifiers of norm placements: learned numbers that scale the residual stream, or the outputs of the sublayers.

Symbols: x the residual stream (batch, tokens, hidden), F a sublayer (attention or MLP).

This file is saved with every model and uploaded to the Hub, so it imports only torch.
"""

import torch
from torch import nn

# Names of a layer's modules.
LAYER_SCALES = ("attention_scale", "mlp_scale")
MODIFIERS = ("activation_scaling", *LAYER_SCALES)


class ActivationScaling(nn.Module):
    """Gradient-Preserving Activation Scaling (GPAS): x <- x - SiLU(g) sg(x).

    Chen et al. 2025, "GPAS: Accelerating Convergence of LLM Pretraining via Gradient-Preserving Activation Scaling"
    (arXiv 2506.22049). The gate g is one learned number of a layer, which both of its sublayers share, as in the
    authors' code; sg has no gradient, so that the gradient of x is not scaled. g starts at 0, where x is unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tensors of one shape."""
        return x - nn.functional.silu(self.gate) * x.detach()


class LayerScale(nn.Module):
    """LayerScale: F(x) <- diag(lambda) F(x), lambda (hidden) learned, all elements `initial` at first.

    Touvron et al. 2021, "Going deeper with Image Transformers" (CaiT, arXiv 2103.17239), section 2, with initial 0.1 up
    to 18 layers, 1e-5 up to 24, 1e-6 above. With 1 a model starts as it is without LayerScale.
    """

    def __init__(self, hidden: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((hidden,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) in and out."""
        return x * self.weight
