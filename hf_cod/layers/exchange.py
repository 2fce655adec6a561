"""Whether one layer can stand in the place of another, of the same model or of another one."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_cod.layers.stack import DecoderLayers

# Entries of a config that say nothing of how layers compute.
OUTSIDE = (
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
)


def why_not_exchangeable(stack: DecoderLayers, layer: int, other: DecoderLayers, donor: int) -> str | None:
    """Why layer `donor` of `other` cannot run in the place of a layer; None if it can.

    It can if both have the same class and weights of the same names and shapes, and if both configs say the same of
    them wherever they have one entry for each layer, such as full or sliding attention: the model prepares masks and
    positions by the place of a layer.
    """
    own, foreign = stack[layer], other[donor]
    if type(own) is not type(foreign):
        return f"{type(foreign).__name__} in the place of {type(own).__name__}"
    mine, theirs = _shapes(own), _shapes(foreign)
    odd = next((name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)), None)
    if odd is not None:
        return f"{odd} of shape {_told(theirs.get(odd))} in the place of {_told(mine.get(odd))}"
    here, there = _entries(stack, layer), _entries(other, donor)
    odd = next((name for name in {**here, **there} if here.get(name) != there.get(name)), None)
    return None if odd is None else f"{odd} {there.get(odd)!r} in the place of {here.get(odd)!r}"


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter and buffer of a layer that a checkpoint holds."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in layer.state_dict(keep_vars=True).items()
        if hasattr(tensor, "shape")
    }


def _told(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _entries(stack: DecoderLayers, layer: int) -> dict[str, Any]:
    """Name -> entry for a layer, of each list in the config that has one for each layer."""
    values = vars(stack.config) if stack.config is not None else {}
    lists = {name: value for name, value in values.items() if isinstance(value, (list, tuple))}
    return {name: value[layer] for name, value in lists.items() if len(value) == len(stack)}


def config_differences(config: Any, other: Any) -> list[str]:
    """Notes on what two configs say differently of how layers compute, such as the base of rotary positions: layers run
    with the positions and masks of the model that they are put into."""
    mine, theirs = ({} if each is None else each.to_dict() for each in (config, other))
    names = [name for name in {**mine, **theirs} if not _is_outside(name) and mine.get(name) != theirs.get(name)]
    return [f"the configs differ in {name}: {mine.get(name)!r} and {theirs.get(name)!r}" for name in sorted(names)]


def _is_outside(name: str) -> bool:
    """Whether an entry of a config is of its file, its tokens or its head, not of layers."""
    return name.startswith("_") or name.endswith(("_token_id", "_token_ids")) or name in OUTSIDE
