"""Zeros in a model's matrices: magnitude, Wanda, SparseGPT, with a sparsity of its own for each layer."""

from hf_cod.pruning.pruner import METHODS, parse_pattern, prune

__all__ = ["METHODS", "parse_pattern", "prune"]
