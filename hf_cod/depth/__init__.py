"""Fewer layers: which of them go, and a linear map in the place of those that went."""

from hf_cod.depth.criteria import CRITERIA, plan_depth
from hf_cod.depth.depth_plan import DepthPlan
from hf_cod.depth.dropper import drop_layers
from hf_cod.depth.maps import REPLACEMENTS

__all__ = ["CRITERIA", "REPLACEMENTS", "DepthPlan", "drop_layers", "plan_depth"]
