"""Kinds of modules, told by their structure, and a walk through those of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_cod.layers.orientation import is_linear
from hf_cod.models.expert_parameters import ExpertParameter
from hf_cod.models.factors import LowRankLinear


def is_linear_like(module: nn.Module) -> bool:
    """Whether `module` is one matrix: nn.Linear, Conv1D, or a quantized module with in_features and out_features.

    A factorized one is two or three.
    """
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return is_linear(module) or (sized and not isinstance(module, LowRankLinear))


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm: LayerNorm, or a class whose name ends in "Norm", such as RMSNorm."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """`module` and all its submodules; of an adapter or compiled module only the wrapped one, under the bare name.

    Packed matrices of experts, which stand in the place of a parameter, are no submodules.
    """
    for inner in ("base_layer", "_orig_mod"):
        if isinstance(getattr(module, inner, None), nn.Module):
            yield from walk(getattr(module, inner), name)
            return
    yield name, module
    for child_name, child in module.named_children():
        if not isinstance(child, ExpertParameter):
            yield from walk(child, f"{name}.{child_name}")
