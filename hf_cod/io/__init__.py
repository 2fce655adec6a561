"""Input and output: text, models, files, run reports, compiled kernels."""
