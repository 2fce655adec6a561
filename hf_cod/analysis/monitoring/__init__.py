"""Monitoring of layers during training: a monitor for any training loop, its history, and a callback for Trainer.

The callback is not imported here, because transformers' Trainer takes longer to import than this whole package.
"""
