"""Low-rank factorization: matrices are replaced by products of two thin factors, with one rank for each matrix."""
