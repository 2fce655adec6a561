"""The structure of a model, and running it layer by layer; only `stack.py` depends on a model's internals."""
