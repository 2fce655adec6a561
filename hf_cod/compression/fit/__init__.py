"""The combination of ways to make a model smaller that meets a budget with the least measured loss."""
