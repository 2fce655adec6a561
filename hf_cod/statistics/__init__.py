"""What enters each matrix, in one streaming pass: LayerStatistics."""

from hf_cod.statistics.layer_statistics import LayerStatistics, collect_statistics

__all__ = ["LayerStatistics", "collect_statistics"]
