"""The decoder's tokens of an encoder-decoder, as the model makes them from labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from hf_cod.layers.devices import execution_device

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


class _Reached(Exception):
    """Ends a forward pass where the decoder's tokens are known."""


def reads_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a batch of an encoder-decoder has labels and no tokens for the decoder."""
    two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    given = {name for name, value in batch.items() if value is not None}
    return bool(two_sides) and "labels" in given and not given.intersection(DECODER_INPUTS)


def decoder_ids(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """(S, T): the tokens that the decoder of a model with its head reads if it gets these labels: those before each
    label, with padding in the place of ignored ones (-100).

    The forward of the head runs up to the model under it, or up to the decoder, and is ended there, so that the rule is
    the model's own and nothing is computed: T5 begins with a start token, mBART with the last label, the language.

    Args:
        model: an encoder-decoder without wrappers.
        batch: with labels, and no tokens for the decoder.

    Returns:
        None if the model makes none, as one without its head, or one whose labels are classes.
    """
    accepted = inspect.signature(model.forward).parameters
    if "labels" not in accepted:
        return None
    inputs: dict[str, Any] = dict(batch)
    if "encoder_outputs" in accepted and "encoder_outputs" not in inputs:  # instead of a run of the encoder
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=_nothing_encoded(model, len(batch["labels"])))
    # `_Reached`, or whatever a model raises on labels that are none for it.
    with torch.no_grad(), _ended_at_decoder(model) as found, suppress(Exception):
        model.forward(**inputs)
    return found[0] if found else None


def _nothing_encoded(model: Any, samples: int) -> Any:
    """(S, 1, width): zeros in place of an encoder's states, which a model may project to the width of its decoder."""
    encoder = model.get_encoder() if callable(getattr(model, "get_encoder", None)) else None
    config = getattr(encoder, "config", None)
    width = getattr(config, "output_hidden_size", None) or getattr(config, "hidden_size", None) or 1
    return torch.zeros(samples, 1, width, dtype=getattr(model, "dtype", None), device=execution_device(model))


@contextmanager
def _ended_at_decoder(model: Any) -> Iterator[list[Tensor]]:
    """Within the block a forward pass ends before the decoder, whose tokens are appended to the list."""
    found: list[Tensor] = []

    def hook_of(name: str) -> Any:
        def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get(name)
            if isinstance(given, Tensor):
                found.append(given)
            raise _Reached

        return stop

    inside = {model.base_model: DECODER_INPUTS[0], _decoder(model): "input_ids"}
    handles = [
        module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for module, name in inside.items()
        if isinstance(module, nn.Module) and module is not model
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _decoder(model: Any) -> Any:
    found = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None
    return getattr(model, "decoder", None) if found is model else found
