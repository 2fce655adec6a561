"""How much each layer matters: LayerScores, and the table of scoring methods."""
