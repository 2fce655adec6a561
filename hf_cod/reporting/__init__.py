"""Output for readers: comparisons, plots, model cards."""
