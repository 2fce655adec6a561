"""What trains: OwLore, its adapters, runs of Trainer, healing, pre-training."""
