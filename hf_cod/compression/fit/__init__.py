"""Finds the combination of compression methods (knobs) that meets a budget with the least measured loss."""
