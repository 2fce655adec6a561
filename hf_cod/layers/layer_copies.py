"""Copies of single layers with random weights, on which structure is measured while the model is not changed; and
copies of a layer's own weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from hf_cod.io.display import quoted
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device
from hf_cod.layers.meta_weights import is_on_meta, on_zeros
from hf_cod.layers.modes import modules_restored
from hf_cod.layers.modules import is_norm
from hf_cod.layers.probe_inputs import image_inputs, probe_inputs
from hf_cod.layers.running import Place, evaluation_mode, hidden_input, hidden_output, tensors_of, with_hidden
from hf_cod.layers.stack import DecoderLayers

# With fewer tokens, a channel behind a ReLU may be silent on all of them.
SAMPLES, TOKENS = 4, 12
_UNKNOWN = "no input is known on which it runs; narrow takes it from batches, which have images for a vision tower"
_SPECIAL = ("_token_id", "_token_index", "_ids")


@dataclass
class LayerCopy:
    """A copy of one layer in float32 with random weights, and inputs of the model's own form for it.

    Attributes:
        layer: the copy.
        args, kwargs: what the model gives to the layer, with a random hidden state.
        replaced: names of modules in it that the model has replaced while it ran.
        handed: places in its output of the tensors beside the hidden state that later layers are given.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    replaced: frozenset[str] = frozenset()
    handed: frozenset[Place] = frozenset()

    @property
    def width(self) -> int:
        """Size of the hidden state."""
        return hidden_input(self.args, self.kwargs).shape[-1]

    def run(self) -> Tensor:
        """The hidden state behind the layer."""
        return hidden_output(self.output())

    def output(self) -> Any:
        """All that the layer returns."""
        return self.layer(*self.args, **self.kwargs)

    def again(self) -> LayerCopy:
        """A copy with the same weights and inputs."""
        return replace(self, layer=copy.deepcopy(self.layer))


class NotRunError(Exception):
    """A layer cannot be run on a random input; the message says why."""


def copy_layers(
    stack: DecoderLayers, indices: Iterable[int], batch: Batch | None = None
) -> dict[int, LayerCopy | NotRunError]:
    """Copies of these layers, made in one forward pass of the model as far as the last of them.

    Layers that the forward pass does not run, or that cannot be run alone, have the reason instead.

    Args:
        stack: the layers.
        indices: of the layers to copy.
        batch: an input for layers that run neither on text nor on an image of the size that the config has.
    """
    with modules_restored(stack.model):  # copied as they ran
        return _copies(stack, sorted(indices), batch)


def _copies(stack: DecoderLayers, wanted: list[int], batch: Batch | None) -> dict[int, LayerCopy | NotRunError]:
    before = {index: dict(stack[index].named_modules()) for index in wanted}
    try:
        seen, handed = _inputs_of(stack, wanted, batch)
    except NotRunError as error:
        return dict.fromkeys(wanted, error)
    except Exception as error:  # whatever a model raises on inputs that it does not take
        reason = NotRunError(f"the model cannot be run on a random input ({quoted(error)})")
        return dict.fromkeys(wanted, reason)
    found: dict[int, LayerCopy | NotRunError] = {}
    for index in wanted:
        try:
            taken = _copied(stack[index], *seen[index])
            new = {name for name, module in stack[index].named_modules() if before[index].get(name) is not module}
            found[index] = replace(taken, replaced=frozenset(new), handed=frozenset(handed.get(index, ())))
        except KeyError:
            found[index] = NotRunError("the model does not run the layer on a random input")
        except Exception as error:  # as above
            found[index] = NotRunError(f"the layer cannot be run on a random input ({quoted(error)})")
    return found


class _Seen(Exception):
    """All inputs are known; the rest of the forward pass is not needed."""


_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs_of(
    stack: DecoderLayers, wanted: list[int], batch: Batch | None
) -> tuple[dict[int, _Inputs], dict[int, set[Place]]]:
    """What each layer is given; and what of its output, beside the hidden state, the next of these layers is given."""
    watched = [*wanted, *range(wanted[-1] + 1, len(stack))[:1]]
    seen: dict[int, _Inputs] = {}
    returned: dict[int, list[tuple[Place, Tensor]]] = {}
    handed: dict[int, set[Place]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(index, (args, dict(kwargs)))
            given = {id(tensor) for _, tensor in tensors_of((args[1:], kwargs))}
            for earlier, tensors in returned.items():
                handed.setdefault(earlier, set()).update(place for place, tensor in tensors if id(tensor) in given)
            if index == watched[-1]:
                raise _Seen

        return hook

    def keep_output(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            returned[index] = [*tensors_of(output)]

        return hook

    handles = [stack[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in watched]
    handles += [stack[i].register_forward_hook(keep_output(i)) for i in wanted]
    zeros = on_zeros(stack.model) if is_on_meta(stack.model) else nullcontext()
    try:
        with evaluation_mode(stack), torch.no_grad(), zeros:
            _run_until(seen, stack, batch)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen, handed


def _run_until(seen: dict[int, _Inputs], stack: DecoderLayers, batch: Batch | None) -> None:
    """Runs the model on inputs of one kind after another, until its layers have run.

    Raises:
        Exception: the error of the last kind, or of a pass in which some of the layers have run.
    """
    # The others are for layers of a tower that does not run on the main input.
    for run in (lambda: _run(stack.trunk), lambda: _run_on(stack, batch), lambda: _run(stack.tower)):
        failure = None
        try:
            run()
        except Exception as error:
            if seen:
                raise
            failure = error
        if seen:
            return
    if failure is not None:
        raise failure


def _run_on(stack: DecoderLayers, batch: Batch | None) -> None:
    """Runs the model on this batch, or on text with an image; not at all if no image is known."""
    images = image_inputs(stack.model) if batch is None else batch
    if images is not None:
        inputs, device = probe_inputs(stack.model, images)
        with device:
            stack.model(**inputs)


def _run(trunk: Any) -> None:
    told = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
    trunk(**_random_inputs(trunk), **told)


def _random_inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, main = next(model.parameters()), getattr(model, "main_input_name", "input_ids")
    try:
        device = execution_device(model)
    except ValueError:  # weights without values
        device = first.device
    config = model.config if hasattr(model.config, "image_size") else model.config.get_text_config()
    if main not in inspect.signature(model.forward).parameters or (
        main == "pixel_values" and not hasattr(config, "image_size")
    ):
        raise NotRunError(_UNKNOWN)
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        pixels = torch.randn(SAMPLES, getattr(config, "num_channels", 3), *size, generator=generator)
        return {"pixel_values": pixels.to(device, first.dtype)}
    if main == "input_features":  # sound, such as Whisper's
        shape = (SAMPLES, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        sound = torch.randn(shape, generator=generator).to(device, first.dtype)
        start = torch.full((SAMPLES, TOKENS), model.config.decoder_start_token_id or 0, device=device)
        return {"input_features": sound, "decoder_input_ids": start}
    table = model.get_input_embeddings()
    words = table.num_embeddings if hasattr(table, "num_embeddings") else len(table.weight)
    special = _special_tokens(model.config)
    plain = torch.tensor([token for token in range(words) if token not in special])
    chosen = plain[torch.randint(len(plain), (SAMPLES, TOKENS), generator=generator)]
    inputs = {"input_ids": chosen.to(device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _special_tokens(config: Any) -> set[int]:
    """Tokens that a model treats in another way, such as padding and the places of images."""
    values = [value for name, value in vars(config).items() if name.endswith(_SPECIAL)]
    return {value for value in values if isinstance(value, int)}


def _copied(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCopy:
    made = copy.deepcopy(layer)
    remove_hook_from_module(made, recurse=True)
    made = made.float().eval()
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, p in list(module.named_parameters(recurse=False)):
            values = _random(p.shape, is_norm(module) and name != "bias", generator)
            device = "cpu" if p.is_meta else p.device
            setattr(module, name, nn.Parameter(values.to(device), requires_grad=True))
    args = tuple(_plain(value) for value in args)
    kwargs = {name: _plain(value) for name, value in kwargs.items()}
    hidden = hidden_input(args, kwargs)
    random = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    taken = LayerCopy(made, *with_hidden(args, kwargs, random))
    with torch.no_grad():
        if not taken.again().run().isfinite().all():
            raise ValueError("its outputs are not finite")
    return taken


def _random(shape: torch.Size, is_scale: bool, generator: torch.Generator) -> Tensor:
    """Weights of a matrix keep the scale of its inputs. Vectors are near 1 in norms, else near 0: a large bias would
    silence channels behind a ReLU on all tokens.
    """
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / shape[-1] ** 0.5
    return 1 + 0.3 * values if is_scale else 0.1 * values


def _plain(value: Any) -> Any:
    """Floating-point tensors, also in tuples, in float32."""
    if isinstance(value, Tensor):
        return value.detach().float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_plain(each) for each in value)
    return value


def own_weights(layer: nn.Module) -> None:
    """Gives a layer copies of its weights and buffers; what is tied inside of it stays tied."""
    memo: dict[int, Any] = {}
    for module in layer.modules():
        both: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in both:
            for name, tensor in [*held.items()]:
                if tensor is not None:
                    held[name] = copy.deepcopy(tensor, memo)
