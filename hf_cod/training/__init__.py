"""Training: OwLore, OwLore adapters, Trainer runs, healing, pre-training."""
