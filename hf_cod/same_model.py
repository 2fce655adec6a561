"""Whether what was found on one model is used on the same: by the sizes of its layers, and by its name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hf_cod.decoder_layers import DecoderLayers

logger = logging.getLogger(__name__)


def check_sizes(field: str, model: str, sizes: Sequence[int] | None, stack: DecoderLayers) -> None:
    """Makes sure that what was found on a model with layers of those sizes is used on one with the same.

    Args:
        field: what was found; messages begin with it.
        model: the name of the model that it was found on; where only that differs, a warning says so.
        sizes: weights in the matrices of each of its layers; None: not known, so that all pass.
        stack: the layers that it is used on.

    Raises:
        ValueError: another number of layers, or a layer with another number of weights.
    """
    if sizes is None:
        return
    expected = sizes_of(stack)
    if len(sizes) != len(expected):
        raise ValueError(f"{field}: expected those of a model with {len(expected)} layers, got {len(sizes)} ({model})")
    wrong = [index for index, size in enumerate(sizes) if size != expected[index]]
    if wrong:
        raise ValueError(
            f"{field}: expected those of a model with {expected[wrong[0]]} weights in layer {wrong[0]}, got one with "
            f"{sizes[wrong[0]]} ({model})"
        )
    warn_of_other_name(field, model, stack)


def sizes_of(stack: DecoderLayers) -> list[int]:
    """By what scores and plans know a model: weights in the matrices of each of its layers."""
    return [stack.count_weights(index) for index in range(len(stack))]


def name_of(stack: DecoderLayers) -> str:
    """What scores and plans call a model: where it was loaded from, or its class."""
    config = getattr(stack.model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(stack.model).__name__)


def other_name(field: str, model: str, stack: DecoderLayers) -> list[str]:
    """A sentence where the names differ, but for the directories before them: a model may have moved; else none."""
    mine = name_of(stack)
    if model.rstrip("/").rpartition("/")[2] == mine.rstrip("/").rpartition("/")[2]:
        return []
    return [f"{field}: used on {mine}, but found on {model}, whose layers are as large"]


def warn_of_other_name(field: str, model: str, stack: DecoderLayers) -> None:
    """Warns where the names differ; see `other_name`."""
    for told in other_name(field, model, stack):
        logger.warning("%s", told)
