"""Depth pruning: removes layers, and optionally replaces them by linear maps."""
