"""Healing: distillation of the original model into its compressed version, which stays compressed."""
