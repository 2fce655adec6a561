"""What a model answers without each of its layers."""
