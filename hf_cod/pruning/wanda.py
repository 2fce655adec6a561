"""Wanda: in each row the weights go whose products with their inputs are smallest."""

from __future__ import annotations

from torch import Tensor

from hf_cod.functional.sparsity import wanda_mask
from hf_cod.pruning.method import Method, Target
from hf_cod.statistics.layer_statistics import StatisticsRecorder


def _prune(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    assert sums is not None
    return W.masked_fill(wanda_mask(W, sums.sqrt().to(W.device), target.sparsity, target.pattern), 0)


WANDA = Method(_prune, StatisticsRecorder, takes_squares=True)
