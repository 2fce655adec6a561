"""Evaluation of models on batches and benchmarks."""
