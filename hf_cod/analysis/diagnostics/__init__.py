"""Diagnostics of layers: a forward pass, a backward pass, and the removal of each layer; `diagnose` runs them all."""
