"""What is done to make a model smaller: one folder a method."""
