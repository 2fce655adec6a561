"""How good a model is on batches."""
