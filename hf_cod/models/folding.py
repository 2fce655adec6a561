"""Folding: factors of a placement and weights of a stock model that compute the same function.

Symbols: l the layer counted from 1, e the exponent of LNS, gamma the weight of a norm, W the last Linear of a sublayer.
The norms of an LNS layer give gamma x_hat l^-e, so a stock layer with gamma' = gamma l^-e computes the same function,
and vice versa; a factor on the output of a sublayer, of LNS or of LayerScale, is one on the rows of W and on its bias.
Training differs: the gradient of gamma in an LNS layer is l^-e of that of gamma'.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import Family
from .modeling_cod import placements_of
from .modifiers import LAYER_SCALES
from .placements import RESIDUAL_PROJECTIONS

_ON_THE_SUM = (
    "its norm acts on the sum x + F(x) and rescales the residual stream by a factor that depends on the input, for "
    "which a stock model has no operation"
)
WHY_NOT_FOLDABLE = {
    "post": _ON_THE_SUM,
    "mix": f"in the first layers {_ON_THE_SUM}",
    "deepnorm": _ON_THE_SUM,
    "sandwich": "it has four norms in a layer, and a stock model of this family has two",
    "reordered": "its norm acts on the output of a sublayer, where a stock model of this family has none",
}

Factor = float | torch.Tensor
"""A number, or one for each element of the hidden size."""


def check_foldable(model: Any, family: Family) -> None:
    """Raise ValueError, with the reason, if no stock model of the family computes what `model` does."""
    placement = model.config.norm_placement
    if placement not in family.foldable:
        raise ValueError(
            f"norm_placement: expected one of {', '.join(family.foldable)}, got {placement!r}, which cannot be folded: "
            f"{WHY_NOT_FOLDABLE[placement]}"
        )
    gates = [layer.activation_scaling.gate for layer in model.base_model.layers] if model.config.gpas else []
    if any(bool(gate.any()) for gate in gates):
        raise ValueError(
            "gpas: expected gates of 0, got others, which cannot be folded: they scale the residual stream, for which "
            "a stock model has no operation"
        )


def norm_scales(model: Any) -> list[float]:
    """The factor of each layer on the outputs of its norms."""
    return [placement.scale for placement in placements_of(model)]


def output_scales(model: Any) -> list[tuple[Factor, Factor]]:
    """The factors of each layer on the outputs of attention and MLP."""
    factors: list[tuple[Factor, Factor]] = []
    for layer, placement in zip(model.base_model.layers, placements_of(model), strict=True):
        scales = [
            1.0 if one is None else one.weight.detach().double().cpu()
            for one in (layer.attention_scale, layer.mlp_scale)
        ]
        factors.append((scales[0] * placement.output_scale, scales[1] * placement.output_scale))
    return factors


@torch.no_grad()
def scale_norms(model: PreTrainedModel, family: Family, factors: list[float]) -> None:
    """Multiply the outputs of the norms before layer l's sublayers by `factors[l]`: in the weights, rounded once."""
    for layer, factor in zip(model.base_model.layers, factors, strict=True):  # type: ignore[arg-type]
        if factor == 1.0:
            continue
        for name in family.absorbers:
            module = layer.get_submodule(name)
            # The factor is on the input of a Linear, so its bias is not scaled; it is on the output of a norm.
            weights = [module.weight] if isinstance(module, nn.Linear) else list(module.parameters())
            for weight in weights:
                weight.copy_(weight.double() * factor)


@torch.no_grad()
def scale_outputs(model: PreTrainedModel, factors: list[tuple[Factor, Factor]]) -> None:
    """Multiply the outputs of layer l's attention and MLP by `factors[l]`: in the weights, rounded once."""
    for layer, both in zip(model.base_model.layers, factors, strict=True):  # type: ignore[arg-type]
        for linear, factor in zip(_last_linears(layer), both, strict=True):
            factor = torch.as_tensor(factor, dtype=torch.float64)
            if bool((factor == 1).all()):
                continue
            linear.weight.copy_(linear.weight.double() * factor.reshape(-1, 1))
            if linear.bias is not None:
                linear.bias.copy_(linear.bias.double() * factor)


def neutral_modifiers(config: Any) -> dict[str, torch.Tensor]:
    """Name below the base model -> the modifiers' weights with which the model computes what it does without them."""
    made: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        if getattr(config, "gpas", False):
            made[f"layers.{layer}.activation_scaling.gate"] = torch.zeros(1)
        if getattr(config, "layer_scale", None) is not None:
            made |= {f"layers.{layer}.{name}.weight": torch.ones(config.hidden_size) for name in LAYER_SCALES}
    return made


def _layer_scales(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in LAYER_SCALES]


def _last_linears(layer: nn.Module) -> list[Any]:
    """The last Linear of the attention and that of the MLP."""
    named = [(name.rsplit(".", 1)[-1], module) for name, module in layer.named_modules()]
    return [module for name in RESIDUAL_PROJECTIONS for leaf, module in named if leaf == name]
