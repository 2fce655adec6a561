"""What a model is made of, and running it piece by piece; `stack.py` alone knows a model's inside."""
