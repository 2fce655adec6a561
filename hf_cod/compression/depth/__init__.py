"""Fewer layers: which of them go, and a linear map in the place of those that went."""
