"""Matrices as products of two thin ones, with a rank of its own for each."""

from hf_cod.low_rank.factorizer import METHODS, factorize
from hf_cod.low_rank.rank_plan import RankPlan
from hf_cod.low_rank.spectra import WEIGHINGS, plan_ranks

__all__ = ["METHODS", "WEIGHINGS", "RankPlan", "factorize", "plan_ranks"]
