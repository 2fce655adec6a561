"""Pre-training from scratch: recipes, packed text, and what a training loop starts from.

The loops themselves are examples/pretrain.py (Trainer) and examples/pretrain_accelerate.py.
"""
