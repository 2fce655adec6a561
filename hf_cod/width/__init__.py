"""Layers with fewer attention heads and MLP channels, as many in each as its share allows."""

from hf_cod.width.methods import COMPENSATIONS, METHODS
from hf_cod.width.narrower import narrow
from hf_cod.width.width_plan import WidthPlan

__all__ = ["COMPENSATIONS", "METHODS", "WidthPlan", "narrow"]
