"""Layers with fewer attention heads and MLP channels, as many in each as its share allows."""
