"""Fine-tuning a few sampled layers at a time, their gradients in low rank: OwLore, LISA and GaLore."""
