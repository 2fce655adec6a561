"""Layers that are not removed: those in which massive activations arise, on which all later layers rely, and those that
`drop` refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from hf_cod.analysis.diagnostics.forward_measures import ForwardMeasures
from hf_cod.compression.depth.depth_plan import check_count
from hf_cod.layers.removal.refusals import refused_layers
from hf_cod.layers.stack import DecoderLayers

logger = logging.getLogger(__name__)

# Factor by which the largest magnitude of the residual stream must grow within one layer.
JUMP = 10.0


def massive_layers(measures: ForwardMeasures) -> list[int]:
    """Layers l with max |x^(l+1)| >= JUMP max |x^l|, over all tokens and channels.

    A few entries of the first token grow in one layer to thousands of times the others (massive activations, Sun et
    al. 2024, arXiv 2402.17762) and remain until the last layers. Attention relies on them, so the layer that produces
    them must not be removed, even if it hardly changes other hidden states. In SmolLM2-135M the largest magnitude grows
    209-fold in layer 11, from 118 to 24,600, and in no layer after it; the block influence of that layer is similar to
    that of its neighbours. Layer 0, whose inputs are the embeddings, is usually among these layers, too.

    Args:
        measures: of `measure_forward`, with "output_variance" among its metrics.
    """
    largest = measures.outputs[..., 3].amax(0)
    return [i for i in range(len(largest) - 1) if float(largest[i + 1]) >= JUMP * float(largest[i])]


def protected_layers(stack: DecoderLayers, protect: bool | int | Iterable[int], measures: ForwardMeasures) -> list[int]:
    """The layers that `DepthSettings.protect` means.

    Raises:
        ValueError: an index that does not exist.
    """
    if isinstance(protect, bool):
        return massive_layers(measures) if protect else []
    found = [protect] if isinstance(protect, int) else sorted(set(protect))
    wrong = [i for i in found if not 0 <= i < len(stack)]
    if wrong:
        raise ValueError(f"protect: expected True, False or indices from 0 to {len(stack) - 1}, got {wrong}")
    return found


def unremovable(stack: DecoderLayers, n_removed: int, protected: list[int]) -> list[int]:
    """The layers that no criterion may remove because `drop` refuses it, the protected ones aside. A warning names
    them, and why.

    Raises:
        ValueError: fewer than `n_removed` layers are left, or `n_removed` is out of range.
    """
    check_count(n_removed, len(stack), "n_removed")
    free = [i for i in range(len(stack)) if i not in protected]
    if n_removed > len(free):
        raise ValueError(
            f"n_removed: expected at most {len(free)} of {len(stack)} layers without the protected ones "
            f"({', '.join(map(str, protected))}), got {n_removed}; protect=False removes the protection"
        )
    refused = refused_layers(stack, free, n_removed)
    if not refused:
        return []
    why = refused[min(refused)]
    if len(refused) == len(free):
        raise ValueError(why)
    logger.warning("layers %s are not removed: %s", ", ".join(map(str, refused)), why)
    if n_removed > len(free) - len(refused):
        raise ValueError(
            f"n_removed: expected at most {len(free) - len(refused)} layers that can be removed, got {n_removed}; {why}"
        )
    return sorted(refused)
