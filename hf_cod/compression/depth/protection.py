"""Protection of layers in which massive activations arise: all later layers rely on these activations."""

from __future__ import annotations

import logging

from hf_cod.analysis.diagnostics.forward_measures import ForwardMeasures
from hf_cod.compression.depth.depth_plan import check_count
from hf_cod.layers.removal.drop import skip
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


def removable(stack: DecoderLayers, n_removed: int, protected: list[int]) -> list[int]:
    """The layers that a criterion may remove: those that are not protected, and at which the model does nothing by
    their index. A warning names the others.

    Raises:
        ValueError: there are fewer than `n_removed`, or `n_removed` is out of range.
    """
    check_count(n_removed, len(stack), "n_removed")
    free = [i for i in range(len(stack)) if i not in protected]
    if n_removed > len(free):
        raise ValueError(
            f"n_removed: expected at most {len(free)} of {len(stack)} layers without the protected ones "
            f"({', '.join(map(str, protected))}), got {n_removed}; protect=False removes the protection"
        )
    refused = _refused(stack, free)
    if refused:
        why = refused[min(refused)]
        logger.warning("layers %s are not removed: %s", ", ".join(map(str, refused)), why)
        free = [i for i in free if i not in refused]
        if n_removed > len(free):
            raise ValueError(
                f"n_removed: expected at most {len(free)} layers that can be removed, got {n_removed}; {why}"
            )
    return free


def _refused(stack: DecoderLayers, layers: list[int]) -> dict[int, str]:
    """Layer -> why `skip` refuses to remove it; empty if it refuses all of them, which may depend on their number.

    Without layer 0 all others move: if it can be removed, no layer has something by its index.
    """
    if _why_refused(stack, 0) is None:
        return {}
    found = {i: why for i in layers if (why := _why_refused(stack, i)) is not None}
    return found if len(found) < len(layers) else {}


def _why_refused(stack: DecoderLayers, layer: int) -> str | None:
    try:
        with skip(stack.model, layer, stack.layers_path):
            return None
    except ValueError as error:
        return str(error)
