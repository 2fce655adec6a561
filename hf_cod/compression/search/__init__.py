"""Search for a plan of sparsity or bits that is judged whole, by the divergence of the compressed model."""
