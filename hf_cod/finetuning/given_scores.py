"""Scores, or an allocation made of them, that a user gives beside a model."""

from __future__ import annotations

from hf_cod.allocation import LayerAllocation
from hf_cod.decoder_layers import DecoderLayers
from hf_cod.same_model import check_sizes
from hf_cod.scores import LayerScores


def check_model(scores: LayerScores | LayerAllocation, stack: DecoderLayers) -> None:
    """Makes sure that they are of that model, as far as its sizes tell; warns where only its name is another.

    Raises:
        ValueError: neither of both, another number of layers, or layers of other sizes.
    """
    if not isinstance(scores, (LayerScores, LayerAllocation)):
        raise ValueError(f"scores: expected LayerScores, a LayerAllocation or None, got {type(scores).__name__}")
    sizes = scores.parameters if isinstance(scores, LayerScores) else scores.sizes
    if len(scores.values) != len(stack):
        raise ValueError(f"scores: expected those of a model with {len(stack)} layers, got {len(scores.values)}")
    check_sizes("scores", scores.model, sizes, stack)
