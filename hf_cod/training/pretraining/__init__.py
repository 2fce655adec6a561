"""Pre-training from scratch: recipes, and the tokenizer, packed text and model for a training loop.

The training loops are examples/pretrain.py (Trainer) and examples/pretrain_accelerate.py.
"""
