"""Fine-tuning of a few sampled layers at a time, with low-rank gradients: OwLore, LISA and GaLore."""
