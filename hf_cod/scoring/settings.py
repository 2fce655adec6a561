"""What `score_layers` and `allocate` can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from hf_cod.functional.bits import BITS, SCALE_BITS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import current_value
from hf_cod.io.settings import check_choice, layers_path_field

# Score -> what a layer gets a high one for; `score_layers` has the formulas.
METHODS = {
    "owl": "a large share of outliers among |W_ij| ||X_j|| (OWL)",
    "angular": "a large angle between its input and output, at the last token",
    "block_influence": "a small cosine between its input and output",
    "gradient_norm": "a large gradient of the loss by its weights",
    "fisher": "a high cost, to second order, of losing its outputs",
    "layer_drop": "a high cost of removing it",
    "weight_norm": "a large mean of |W_ij|, a baseline",
    "sensitivity": "a steep rise of the loss as it is pruned more",
    "auto": "what the best of several scores says, tried on a little text",
    "uniform": "nothing: all are equal, a baseline",
    "depth": "being early, a baseline",
    "random": "nothing: drawn by seed, a baseline",
}
# How sensitivity and auto try a layer: two ways to make zeros, and one to round to 3 or 4 bits.
CODEBOOK = "codebook"
PRUNERS = {
    "wanda": "zeros by |W_ij| ||X_j||, within a row",
    "magnitude": "zeros by |W_ij|, within a matrix",
    CODEBOOK: "rounding to 3 or 4 bits",
}
Kind = Literal["sparsity", "bits", "rank", "parameter_share", "probability"]
# What a budget counts -> what its number means.
KINDS: dict[str, str] = {
    "sparsity": "share of zeros",
    "bits": "bits of a weight",
    "rank": "share of the full rank that is kept",
    "parameter_share": "share of the weights that is kept",
    "probability": "probability that a layer is drawn",
}
# As version 0.1 called them -> as they are called.
OLD_KINDS = {"parameters": "parameter_share"}
Rule = Literal["bounded", "authors"]
RULES: dict[str, str] = {
    "bounded": "values stay within the spread, and their weighted mean is the budget",
    "authors": "OWL's released formula, which keeps neither",
}
USE_STATISTICS = ("owl", "sensitivity", "auto")  # of METHODS
DEFAULT_SPREAD = 0.08  # OWL (arXiv 2310.05175), lambda


@checked
@dataclass
class ScoreSettings:
    """How layers are scored."""

    method: str = field(
        default="owl",
        metadata={
            "help": "owl, angular, block_influence, gradient_norm, fisher, layer_drop, weight_norm, sensitivity, auto "
            "(tries several on a little text), or as baselines uniform, random or depth (earlier layers matter more)",
        },
    )
    threshold: float = field(
        default=5.0, metadata={"help": "owl: M, how many times the mean an outlier must exceed (paper: 5 or 7)"}
    )
    per_module: bool = field(
        default=False, metadata={"help": "owl: compare each matrix with its own mean instead of the layer's"}
    )
    target: float = field(
        default=0.7,
        metadata={
            "help": "sensitivity and auto: the sparsity that the scores are to serve; of codebook, the stored bits, "
            "scales included"
        },
    )
    pruner: str = field(
        default="wanda",
        metadata={
            "help": "sensitivity and auto: how they try; codebook rounds to 3 or 4 bits instead of pruning",
            "choices": list(PRUNERS),
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of every random choice"})
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold: expected a finite number above 0, got {self.threshold}")
        check_choice("pruner", self.pruner, PRUNERS)
        low, high = (min(BITS) + SCALE_BITS, max(BITS) + SCALE_BITS) if self.pruner == CODEBOOK else (0, 1)
        if not low < self.target < high:
            what = "bits" if self.pruner == CODEBOOK else "a sparsity"
            raise ValueError(f"target: expected {what} between {low:.4g} and {high:.4g}, got {self.target}")


class ScoreFields(TypedDict, total=False):
    """Fields of `ScoreSettings` that `score_layers` takes by name."""

    threshold: float
    per_module: bool
    target: float
    pruner: str
    seed: int
    layers_path: str | None


@checked
@dataclass
class AllocationSettings:
    """How a budget is distributed over layers; `allocate` checks it against the scores."""

    kind: str = field(default="sparsity", metadata={"help": "what the budget counts", "choices": list(KINDS)})
    budget: float = field(default=0.5, metadata={"help": "mean of the layers' values, weighted by their parameters"})
    spread: float | None = field(
        default=None, metadata={"help": "lambda: layers get budget - lambda to budget + lambda; default: 0.08"}
    )
    choices: Sequence[float] | None = field(
        default=None, metadata={"help": "the values that there are, rising; default for bits: 3 and 4, else any"}
    )
    group: int | None = field(
        default=None, metadata={"help": "sparsity as N:M with this M and a different N in each layer"}
    )
    rule: str = field(default="bounded", metadata={"help": "how scores become values", "choices": list(RULES)})

    def __post_init__(self) -> None:
        self.kind = current_value("kind", self.kind, OLD_KINDS, above=2)
        for name, number in (("budget", self.budget), ("spread", self.spread)):
            if isinstance(number, bool) or not isinstance(number, (int, float, type(None))):
                raise ValueError(f"{name}: expected a number, got {number!r}")
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ValueError(f"spread: expected a finite number of at least 0, got {self.spread}")
        check_choice("kind", self.kind, KINDS)
        check_choice("rule", self.rule, RULES)


class AllocationFields(TypedDict, total=False):
    """Fields of `AllocationSettings` that `allocate` takes by name."""

    choices: Sequence[float] | None
    group: int | None
    rule: str
