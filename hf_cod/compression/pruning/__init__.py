"""Pruning: magnitude, Wanda and SparseGPT, with one sparsity for each layer."""
