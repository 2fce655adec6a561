"""Export: plans of bits for other engines, and checkpoints in their formats."""
