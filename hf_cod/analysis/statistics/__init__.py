"""What enters each matrix, in one streaming pass: LayerStatistics."""
