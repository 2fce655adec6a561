"""How much each layer matters: LayerScores, and one table of ways to find them."""
