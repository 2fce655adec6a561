"""The combination of ways to make a model smaller that meets a budget with the least measured loss."""

from hf_cod.fit.fit_plan import FitPlan
from hf_cod.fit.knobs import KNOBS, Applying, describe_steps
from hf_cod.fit.planning import plan_fit
from hf_cod.fit.trials import apply_steps

__all__ = ["KNOBS", "Applying", "FitPlan", "apply_steps", "describe_steps", "plan_fit"]
