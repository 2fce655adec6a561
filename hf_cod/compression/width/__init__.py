"""Width pruning: layers with fewer attention heads and MLP channels, by the parameter share of each layer."""
