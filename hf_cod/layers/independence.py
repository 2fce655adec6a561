"""Whether layers can be run one at a time: each depends on earlier ones only by what the layer before it returns.

That is not so where layers share keys and values (Gemma 3n), or where a model hands states of several layers to a later
one. It is found out by running the layers of the model one at a time on a few tokens, and comparing with the whole.
Measurements of one layer at a time then run the whole model for each (`sequential.py`); what else requires such layers
is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_cod.io.display import one_line
from hf_cod.io.text import Batch
from hf_cod.layers.devices import check_in_memory, random_state_restored
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.layer_calls import REPEATED, layers_obstacle
from hf_cod.layers.modes import modules_restored
from hf_cod.layers.partial_forward import State, last_states, layer_states, run_layer
from hf_cod.layers.probe_inputs import probe_inputs
from hf_cod.layers.running import evaluation_mode, tensors_of
from hf_cod.layers.stack import DecoderLayers

# Relative to the largest value. Both runs compute the same; a GPU may add in another order.
TOLERANCE = 0.01

# The way out where layers are chosen to be removed.
NAMED = "drop in Python removes layers that you name"

# Model -> (name and number of its layers, names of inputs) -> what was found; weights do not matter.
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, str] | None]] = WeakKeyDictionary()
_readers: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def check_independent(
    stack: DecoderLayers, field: str, batches: Sequence[Batch] | None = None, way_out: str = ""
) -> None:
    """Checks that a layer depends on earlier layers only by what the layer before it returns.

    Args:
        stack: the layers.
        field: the user's setting, with which the error begins.
        batches: inputs, of which the first one's first tokens are used; default: an input by the model's config.
        way_out: what to do instead, for the end of the error.

    Raises:
        ValueError: layers that depend on others.
    """
    end = f"; {way_out}" if way_out else ""
    if _shares_keys(stack):
        raise ValueError(f"{field}: expected layers with their own keys and values, got {_SHARING}{end}")
    found = _dependent(stack, batches[0] if batches else None)
    if found is not None:
        raise ValueError(
            f"{field}: expected layers that depend on earlier ones only by what the layer before returns, got "
            f"{type(stack.model).__name__}, whose {_described(*found)}{end}"
        )


def dependence(stack: DecoderLayers, batches: Sequence[Batch]) -> str | None:
    """Why layers cannot be run one after another by themselves; None if they can.

    Args:
        stack: the layers.
        batches: inputs, as in `check_independent`.
    """
    if _shares_keys(stack):
        return f"layers share keys and values ({_SHARING})"
    obstacle = layers_obstacle(stack, direct_use(stack.model, batches).obstacles)
    if obstacle is not None:
        return obstacle
    found = _dependent(stack, batches[0] if batches else None)
    return None if found is None else _described(*found)


def runs_several_times(stack: DecoderLayers, batches: Sequence[Batch] | None = None) -> bool:
    """Whether a layer of these runs several times in a forward pass."""
    obstacles = direct_use(stack.model, batches).obstacles
    return any(obstacles.get(f"{stack.layers_path}.{index}") == REPEATED for index in range(len(stack)))


def reads_several_states(stack: DecoderLayers, batches: Sequence[Batch] | None = None) -> bool:
    """Whether a model reads states of these layers beside that after the last one, as LLaVA those of its vision tower.

    A run that starts behind a layer, with the state after it, lacks the states before it. It is found out by two runs
    from the state after the last layer, with other ones in place of the earlier states.

    Args:
        stack: the layers.
        batches: inputs, as in `check_independent`.
    """
    batch = batches[0] if batches else None
    place = (stack.layers_path, len(stack), *sorted(batch or ()))
    found = _readers.setdefault(stack.model, {})
    if place not in found:
        found[place] = _reads_several(stack, batch)
    return found[place]


def check_last_state(stack: DecoderLayers, field: str, batches: Sequence[Batch] | None = None) -> None:
    """Checks that a model reads no other state of these layers than that after the last one.

    Args:
        stack: the layers.
        field: the user's setting, with which the error begins.
        batches: inputs, as in `check_independent`.

    Raises:
        ValueError: it reads the states after several layers.
    """
    if reads_several_states(stack, batches):
        raise ValueError(
            f"{field}: expected a model that reads the hidden state after the last of its layers alone, got "
            f"{type(stack.model).__name__}, which reads those of other layers of {stack.layers_path}"
        )


_AT_RANDOM = "the model draws random numbers in eval mode: two forward passes on the same input differ"
_SHARING = "num_kv_shared_layers > 0"


def _shares_keys(stack: DecoderLayers) -> bool:
    return bool(getattr(stack.config, "num_kv_shared_layers", 0))


def _described(layer: int, why: str) -> str:
    return f"layer {layer} does not run alone as in the model ({why})"


def _dependent(stack: DecoderLayers, batch: Batch | None) -> tuple[int, str] | None:
    """The first layer that does not compute the same alone, and why; None if all do, or if that cannot be found out."""
    place = (stack.layers_path, len(stack), *sorted(batch or ()))
    found = _known.setdefault(stack.model, {})
    if place not in found:
        found[place] = _first_dependent(stack, batch)
    return found[place]


@torch.no_grad()
def _first_dependent(stack: DecoderLayers, batch: Batch | None) -> tuple[int, str] | None:
    try:
        check_in_memory(stack.model)
        inputs, device = probe_inputs(stack.model, batch)
    except ValueError:  # weights without values
        return None
    with modules_restored(stack.model), evaluation_mode(stack), device:
        try:
            with layer_states(stack) as states:
                stack.trunk(**inputs)
        except Exception:  # whatever a model raises on inputs that may be none for it; on its own, it raises later
            return None
        if any(not state[0].numel() for state in states):  # XLNet with bi_data reads samples in pairs
            return 0, "its hidden state is empty for one sample"
        for layer in range(len(states) - 1):
            try:
                alone = run_layer(stack, layer, inputs, states[layer])
            except Exception as error:  # whatever a model raises that misses the states of other layers
                return layer, f"{type(error).__name__}: {one_line(str(error))[:150]}"
            distance = _distance(alone[0], states[layer + 1][0])
            if distance > TOLERANCE:  # not if it is NaN: forward passes name the layer where that begins
                differs = f"its output differs by {distance:.0%} of its largest value"
                return layer, _AT_RANDOM if _draws_numbers(stack, inputs, states) else differs
    return None


def _draws_numbers(stack: DecoderLayers, inputs: Any, states: Sequence[State]) -> bool:
    """Whether a second forward pass on the same inputs has other states than these."""
    with layer_states(stack) as again:
        stack.trunk(**inputs)
    return any(_distance(one[0], other[0]) > TOLERANCE for one, other in zip(states, again, strict=True))


@torch.no_grad()
def _reads_several(stack: DecoderLayers, batch: Batch | None) -> bool:
    try:
        check_in_memory(stack.model)
        inputs, device = probe_inputs(stack.model, batch)
    except ValueError:  # weights without values
        return False
    with modules_restored(stack.model), evaluation_mode(stack), device:
        try:
            with layer_states(stack) as states:
                stack.model(**inputs)
            last: State = states[-1]
            one, other = (_outputs(stack, inputs, last, each) for each in (last[0], torch.randn_like(last[0])))
        except Exception:  # whatever a model raises on inputs that may be none for it; on its own, it raises later
            return False
    # Both runs compute the same with the same numbers, unless the states differ that they read.
    return any(not torch.equal(found.nan_to_num(), other[at].nan_to_num()) for at, found in one.items() if at in other)


def _outputs(stack: DecoderLayers, inputs: Any, last: State, earlier: Tensor) -> dict[Any, Tensor]:
    """What the model returns with this state after the last layer, and `earlier` after all others."""
    with last_states(stack, last, earlier), random_state_restored(stack.model, seed=0):
        output = stack.model(**inputs)
    return dict(tensors_of(output, by_layer=(len(stack), len(stack) + 1)))


def _distance(found: Any, expected: Any) -> float:
    if found.shape != expected.shape:
        return torch.inf
    largest = expected.float().abs().max().clamp(min=1e-9)
    return float((found.float() - expected.float()).abs().max() / largest)
