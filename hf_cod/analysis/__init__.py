"""Measurements of layers and models: diagnostics, statistics, evaluation, monitoring of a training."""
