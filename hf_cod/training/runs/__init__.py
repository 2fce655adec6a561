"""Training runs: methods, Trainer, memory and its estimate, and the run's directory."""
