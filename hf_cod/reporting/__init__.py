"""What is shown: comparisons, pictures, model cards."""
