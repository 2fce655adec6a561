"""Import: scores and plans of other tools, one reader a format."""
