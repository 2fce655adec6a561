"""What a pruning method is: the sums that it needs, and a function from one matrix to its pruned form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_cod.decoder_layers import DecoderLayers
from hf_cod.functional.sparsity import Pattern
from hf_cod.layer_by_layer import Recorder


@dataclass(frozen=True)
class Target:
    """What a layer's matrices get: `sparsity`, the share of zeros; or as (N, M) the `pattern` that makes it."""

    sparsity: float
    pattern: Pattern | None = None


@dataclass(frozen=True)
class Method:
    """A way to prune one matrix.

    Attributes:
        prune: (W (out, in), the matrix's sum or None, target) -> the pruned W; it leaves W as it is.
        recorder: makes the sums of some layers; None for a method that looks at weights alone.
        takes_squares: whether the sums are those of `LayerStatistics`, so that earlier statistics serve.
    """

    prune: Callable[[Tensor, Tensor | None, Target], Tensor]
    recorder: Callable[[DecoderLayers, Sequence[int]], Recorder] | None = None
    takes_squares: bool = False
