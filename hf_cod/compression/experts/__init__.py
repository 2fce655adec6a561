"""Expert pruning: removes whole experts of a mixture, or merges them into those that are kept."""
