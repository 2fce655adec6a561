"""What the KV cache of transformers requires of the layers that are left."""

from __future__ import annotations

from typing import Any

from hf_cod.layers.removal.config_surgery import cache_depth
from hf_cod.layers.removal.wording import REPETITION, Wording
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stacks import DECODER, ENCODER


def check_attended(stack: DecoderLayers, kept: list[int]) -> None:
    """Checks that a layer is left by which the KV cache counts tokens, if there is one.

    Raises:
        ValueError: all layers of attention are removed.
    """
    kinds = getattr(stack.config, "layer_types", None) or []
    left = [kinds[index] for index in kept if index < len(kinds)]
    if any(map(_attends, kinds)) and not any(map(_attends, left)):
        raise ValueError(
            "layers: expected to keep a layer of attention, by which the cache of "
            f"{type(stack.model).__name__} counts its tokens, got {left}"
        )


def check_cache(stack: DecoderLayers, wording: Wording) -> None:
    """Checks that the KV cache has room for each layer of the decoder.

    transformers sizes it by the number of hidden layers, which is that of the encoder in some encoder-decoders.

    Raises:
        ValueError: the encoder has fewer layers than the decoder.
    """
    model: Any = stack.model
    if not model.can_generate():
        return
    name = type(model).__name__
    if stack.name == ENCODER:
        decoder = len(find_decoder_layers(model, DECODER))
        if cache_depth(model.config) < decoder:
            raise ValueError(
                f"layers: expected at least {decoder} layers in the encoder of {name}, because transformers sizes the "
                f"KV cache of the {decoder} decoder layers by them, got {len(stack)}; first remove layers of the "
                f"decoder, or use {wording.temporary}"
            )
    elif wording is REPETITION and stack.name == DECODER:
        room = cache_depth(model.config)
        if room < len(stack):
            raise ValueError(
                f"layers: expected at most {room} layers in the decoder of {name}, because transformers sizes its KV "
                f"cache by the layers of the encoder, got {len(stack)}; first repeat layers of the encoder, or use "
                f"{wording.temporary}"
            )


def _attends(kind: Any) -> bool:
    """Whether a kind of layer in `layer_types` has a cache of keys and values."""
    return "attention" in str(kind) and "linear" not in str(kind)
