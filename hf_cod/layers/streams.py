"""Layers that hand on several residual streams by name, as a reversible network does (Reformer)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.running import hidden_input, hidden_output
from hf_cod.layers.stack import DecoderLayers


def states_around(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """The hidden states before and after a layer; of several streams, all of them as one vector (S, T, n d) a token.

    The streams are what the layer returns by name in the shape of its input. One that it takes by the same name is the
    same stream; of two that are left, one on each side, the second is what has become of the first.

    Args:
        layer: the layer, which has run.
        args, kwargs: of its call.
        output: what it returned.

    Raises:
        ValueError: a layer that returns something else than its hidden state, or streams that cannot be paired.
    """
    found = _by_name(output)
    if found is None:
        return hidden_input(args, kwargs), hidden_output(output)
    bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    shape = hidden_input(args, kwargs).shape
    before, after = ({name: x for name, x in part.items() if _is_stream(x, shape)} for part in (bound, found))
    names = {name: name for name in after if name in before}
    lone = [[name for name in part if name not in names] for part in (before, after)]
    if not after or [len(part) for part in lone] not in ([0, 0], [1, 1]):
        hidden_output(output)  # says what the layer returns
    names.update(zip(lone[1], lone[0], strict=True))
    return torch.cat([before[names[name]] for name in after], -1), torch.cat([*after.values()], -1)


def check_states(stack: DecoderLayers, layer: int, x: Tensor, y: Tensor, samples: int, tokens: int | None) -> None:
    """Checks the hidden states before and after a layer, as (S, T, d).

    Layers whose tokens are not those of the inputs, such as patches, may have other samples: all patches as one, or
    several images or tiles for each sample of the batch.

    Args:
        stack: the layers.
        layer: index of the layer.
        x, y: its states.
        samples: S of the batch.
        tokens: T of the batch, None if it is unknown.

    Raises:
        ValueError: they have another form, or the layer returns other tokens or another width than it takes.
    """
    # (T, S, d) would be taken for T tiles of S tokens.
    tiles = tokens is None and x.dim() == 3 and (len(x) == 1 or (len(x) % samples == 0 and x.shape[1] != samples))
    if x.dim() != 3 or not (len(x) == samples or tiles):
        raise ValueError(
            f"model: expected hidden states (samples, tokens, width) of {samples} samples, got {tuple(x.shape)}"
        )
    if x.shape != y.shape:
        raise ValueError(
            "layers: expected layers that return hidden states of the shape that they take, got "
            f"{stack.layers_path}.{layer} of {type(stack.model).__name__}, which takes {tuple(x.shape)} and returns "
            f"{tuple(y.shape)}; pass the name of a list of layers inside a stage as layers_path="
        )


def _by_name(output: Any) -> dict[str, Any] | None:
    """What a layer returned by name; None if it returned a tensor, or a plain tuple or list."""
    if isinstance(output, Mapping):
        return dict(output)
    names = getattr(output, "_fields", None)
    return None if names is None else dict(zip(names, output, strict=True))


def _is_stream(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape
