"""Matrices as products of two thin ones, with a rank of its own for each."""
