"""Layers where massive activations arise: a model without one of them loses what all later layers count on."""

from __future__ import annotations

from hf_cod.analysis.diagnostics.forward_pass import ForwardMeasures
from hf_cod.compression.depth.depth_plan import check_count
from hf_cod.layers.stack import DecoderLayers

# By how much the largest magnitude of the residual stream must grow within one layer.
JUMP = 10.0


def massive_layers(measures: ForwardMeasures) -> list[int]:
    """Layers l with max |x^(l+1)| >= JUMP max |x^l|, over all tokens and channels.

    A few entries of the first token grow in one layer to thousands of times the others (massive activations, Sun et
    al. 2024, arXiv 2402.17762) and stay until the last layers; attention rests on them, so the layer that makes them
    is none to remove, however little it turns all other hidden states. In SmolLM2-135M the largest magnitude grows
    209-fold in layer 11, from 118 to 24,600, and behind it in no layer any more; the block influence of that layer is
    that of its neighbours. Layer 0 is mostly among them, too: it makes hidden states of embeddings.

    Args:
        measures: of `measure_forward`, "output_variance" among its metrics.
    """
    largest = measures.outputs[:, 3]
    return [i for i in range(len(largest) - 1) if float(largest[i + 1]) >= JUMP * float(largest[i])]


def removable(stack: DecoderLayers, n_removed: int, protected: list[int]) -> list[int]:
    """The layers that a criterion is free to remove.

    Raises:
        ValueError: fewer than are to be removed, or no such number of layers.
    """
    check_count(n_removed, len(stack), "n_removed")
    free = [i for i in range(len(stack)) if i not in protected]
    if n_removed > len(free):
        raise ValueError(
            f"n_removed: expected at most {len(free)} of {len(stack)} layers beside the protected ones "
            f"({', '.join(map(str, protected))}), got {n_removed}; protect=False lifts the protection"
        )
    return free
