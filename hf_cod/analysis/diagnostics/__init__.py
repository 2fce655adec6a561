"""What each layer does: one forward pass, a sweep of removals, one backward pass; `diagnose` runs them all."""
