"""Sparse storage: pruned models are stored without their zeros, and run faster on CPUs."""
