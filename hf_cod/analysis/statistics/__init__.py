"""Statistics of the inputs of each matrix, in one streaming pass: LayerStatistics."""
