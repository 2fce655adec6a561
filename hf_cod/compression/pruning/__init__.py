"""Zeros in a model's matrices: magnitude, Wanda, SparseGPT, with a sparsity of its own for each layer."""
