"""Zeros in a model's matrices: magnitude, Wanda, SparseGPT, with a sparsity of its own for each layer."""

from hf_cod.pruning.pruner import METHODS, parse_pattern, prune
from hf_cod.pruning.recovery import RecoverySettings, recover
from hf_cod.pruning.weights import measure_sparsity

__all__ = ["METHODS", "RecoverySettings", "measure_sparsity", "parse_pattern", "prune", "recover"]
