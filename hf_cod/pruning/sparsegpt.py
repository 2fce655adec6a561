"""SparseGPT: prunes column by column and lets the other weights make up for what went."""

from __future__ import annotations

from torch import Tensor

from hf_cod.functional.sparsity import sparsegpt
from hf_cod.pruning.method import Method, Target
from hf_cod.statistics.input_products import ProductsRecorder


def _prune(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    assert sums is not None
    return sparsegpt(W, sums.to(W.device), target.sparsity, target.pattern)


SPARSEGPT = Method(_prune, ProductsRecorder)
