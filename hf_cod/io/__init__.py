"""What comes in and goes out: text, models, files, the record of a run, compiled kernels."""
