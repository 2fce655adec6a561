"""Settings of `score_layers` and `allocate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from hf_cod.functional.bits import BITS, SCALE_BITS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import current_value
from hf_cod.io.settings import SampleFields, as_in, check_choice, layers_path_field

# What has a score of its own -> its matrices.
GRANULARITIES: dict[str, str] = {
    "layer": "all matrices of a layer",
    "block": "those of its attention, and those of its MLP",
    "module": "each matrix",
}
# What has a value of a plan of its own; scores of experts are in addition to those of layers.
EXPERT = "expert"
PLAN_GRANULARITIES = GRANULARITIES | {EXPERT: "each expert of a mixture, and the other weights of each layer"}


@dataclass(frozen=True)
class Method:
    """A method of scoring layers; `methods.METHODS` has its function.

    Attributes:
        description: the property that gives a layer a high score; `score_layers` has the formulas.
        settings: the fields of `ScoreSettings` that it depends on. They are saved with the scores, and commands refuse
            the others.
        needs_batches: whether it runs the model on batches.
        needs_weights: whether it reads weights; if not, it also scores models on the meta device.
        uses_statistics: whether it uses `LayerStatistics`, so that saved statistics can be passed.
    """

    description: str
    settings: tuple[str, ...] = ()
    needs_batches: bool = False
    needs_weights: bool = True
    uses_statistics: bool = False


_OF_OWL, _OF_PROBE, _OF_PARTS = ("threshold", "per_module"), ("target", "pruner"), ("granularity",)
METHODS = {
    "owl": Method("a large share of outliers among |W_ij| ||X_j|| (OWL)", (*_OF_OWL, *_OF_PARTS), uses_statistics=True),
    "angular": Method("a large angle between its input and output, at the last token", needs_batches=True),
    "block_influence": Method("a small cosine similarity of its input and output", needs_batches=True),
    "gradient_norm": Method("a large gradient of the loss with respect to its weights", needs_batches=True),
    "fisher": Method(
        "a large second-order estimate of the increase of the loss if its outputs are lost",
        _OF_PARTS,
        needs_batches=True,
    ),
    "layer_drop": Method("a large increase of the loss when it is removed", needs_batches=True),
    "weight_norm": Method("a large mean of |W_ij|, a baseline", _OF_PARTS),
    "sensitivity": Method(
        "a large increase of the loss when its sparsity increases", _OF_PROBE, needs_batches=True, uses_statistics=True
    ),
    "kl": Method(
        "a large KL divergence from the intact model's predictions when it alone is changed",
        (*_OF_PROBE, *_OF_PARTS),
        needs_batches=True,
        uses_statistics=True,
    ),
    "auto": Method(
        "a high score by uniform, owl, angular, fisher or sensitivity, whichever gives the compressed model the "
        "lowest loss",
        (*_OF_PROBE, *_OF_OWL),
        needs_batches=True,
        uses_statistics=True,
    ),
    "uniform": Method("nothing (all layers have equal scores), a baseline", _OF_PARTS, needs_weights=False),
    "depth": Method("an early position, a baseline", _OF_PARTS, needs_weights=False),
    "random": Method("a high random number from the seed, a baseline", ("seed", *_OF_PARTS), needs_weights=False),
}

# Methods whose scores of parts are logarithms of costs per weight.
LOGARITHMS = ("fisher", "kl")


@dataclass(frozen=True)
class ExpertMethod:
    """A method of scoring experts; `expert_methods.METHODS` has its function.

    Attributes:
        description: the property that gives an expert a high score; `score_experts` has the formulas.
        settings: the fields of `ExpertScoreSettings` that it depends on.
    """

    description: str
    settings: tuple[str, ...] = ()


EXPERT_METHODS = {
    "reap": ExpertMethod("a large mean of gate weight times norm of the output, over the tokens routed to it (REAP)"),
    "router_weight": ExpertMethod("a large mean of its gate weight over all tokens"),
    "frequency": ExpertMethod("a large share of tokens routed to it"),
    "owl": ExpertMethod("a large share of outliers among |W_ij| ||X_j|| of its own inputs (OWL)", ("threshold",)),
}
# How sensitivity, kl and auto change a layer: two pruners, and rounding to 3 or 4 bits.
CODEBOOK = "codebook"
PRUNERS = {
    "wanda": "zeros by |W_ij| ||X_j||, within a row",
    "magnitude": "zeros by |W_ij|, within a matrix",
    CODEBOOK: "rounding to 3 or 4 bits",
}
Kind = Literal["sparsity", "bits", "rank", "parameter_share", "probability"]
# Kind of budget -> the meaning of its number.
KINDS: dict[str, str] = {
    "sparsity": "share of zeros",
    "bits": "bits per weight",
    "rank": "share of the full rank that is kept",
    "parameter_share": "share of the weights that is kept",
    "probability": "probability that a layer is sampled",
}
# Name in version 0.1 -> present name.
OLD_KINDS = {"parameters": "parameter_share"}
RULES: dict[str, str] = {
    "bounded": "values are within the spread, and their weighted mean is the budget",
    "authors": "OWL's released formula, which guarantees neither",
}
# In errors on settings of a score beside a scores file.
COMPUTED = "scores, which are already computed"
DEFAULT_SPREAD = 0.08  # OWL (arXiv 2310.05175), lambda


@checked
@dataclass
class ScoreSettings:
    """How layers are scored."""

    method: str = field(
        default="owl",
        metadata={
            "help": "the property that gives a layer a high score. "
            + "; ".join(f"{name}: {method.description}" for name, method in METHODS.items())
            + ". If the scores are for hf-cod prune, set angular, the default of prune"
        },
    )
    threshold: float = field(
        default=5.0,
        metadata={"help": "owl: outliers are |W_ij| ||X_j|| above this multiple (M) of the mean (paper: 5 or 7)"},
    )
    per_module: bool = field(
        default=False, metadata={"help": "owl: the mean is that of each matrix instead of that of the layer"}
    )
    target: float = field(
        default=0.7,
        metadata={
            "help": "sensitivity, kl and auto: sparsity at which layers are scored; with --pruner codebook: stored "
            "bits per weight, scales included (kl: always 3 bits)"
        },
    )
    pruner: str = field(
        default="wanda",
        metadata={
            "help": "sensitivity, kl and auto: how layers are changed to measure the loss. "
            + "; ".join(f"{name}: {effect}" for name, effect in PRUNERS.items()),
            "choices": list(PRUNERS),
        },
    )
    granularity: str = field(
        default="layer",
        metadata={
            "help": "what has a score of its own. "
            + "; ".join(f"{name}: {meant}" for name, meant in GRANULARITIES.items())
            + ". Scores that exist for whole layers only require layer",
            "choices": list(GRANULARITIES),
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of all random choices"})
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_threshold(self.threshold)
        check_choice("pruner", self.pruner, PRUNERS)
        low, high = (min(BITS) + SCALE_BITS, max(BITS) + SCALE_BITS) if self.pruner == CODEBOOK else (0, 1)
        if not low < self.target < high:
            what = "bits" if self.pruner == CODEBOOK else "a sparsity"
            raise ValueError(f"target: expected {what} between {low:.4g} and {high:.4g}, got {self.target}")


def check_threshold(threshold: float) -> None:
    """Checks OWL's M.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number above 0, got {threshold}")


# Settings of any score, in the order of the table; the seed is common to all random choices of a command.
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.settings if name != "seed"))


def options_of(settings: Any, score: str | None = None) -> list[str]:
    """The fields of a command's settings that are settings of a score, or of any score if none is named."""
    known = OPTIONS if score is None else METHODS[score].settings
    return [name for name in OPTIONS if name in known and name in type(settings).__dataclass_fields__]


def score_with(option: str) -> str:
    """The first score that depends on a setting."""
    return next(name for name, method in METHODS.items() if option in method.settings)


class ScoreFields(SampleFields, total=False):
    """Fields of `ScoreSettings`, and of samples, that `score_layers` takes by name."""

    threshold: float
    per_module: bool
    target: float
    pruner: str
    granularity: str
    layers_path: str | None


@checked
@dataclass
class ExpertScoreSettings:
    """How experts are scored."""

    method: str = field(
        default="reap",
        metadata={
            "help": "the property that gives an expert a high score. "
            + "; ".join(f"{name}: {method.description}" for name, method in EXPERT_METHODS.items())
        },
    )
    threshold: float = as_in(ScoreSettings, "threshold")
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        check_choice("method", self.method, EXPERT_METHODS)
        check_threshold(self.threshold)


class ExpertScoreFields(SampleFields, total=False):
    """Fields of `ExpertScoreSettings`, and of samples, that `score_experts` takes by name."""

    threshold: float
    layers_path: str | None


@checked
@dataclass
class AllocationSettings:
    """How a budget is distributed over layers; `allocate` checks it against the scores."""

    kind: str = field(default="sparsity", metadata={"help": "quantity of the budget", "choices": list(KINDS)})
    budget: float = field(default=0.5, metadata={"help": "mean of the layers' values, weighted by their parameters"})
    spread: float | None = field(
        default=None,
        metadata={
            "help": "largest difference between a layer's value and the budget (lambda of OWL), in the unit of the "
            "budget; default: 0.08; with score auto, the spread that auto chose"
        },
    )
    choices: Sequence[float] | None = field(
        default=None, metadata={"help": "allowed values in ascending order; default for bits: 3 and 4, else any"}
    )
    group: int | None = field(
        default=None, metadata={"help": "N:M sparsity with this M and a separate N for each layer"}
    )
    rule: str = field(default="bounded", metadata={"help": "how scores become values", "choices": list(RULES)})
    granularity: str | None = field(
        default=None,
        metadata={
            "help": "what has a value of its own, block and module by scores of these. "
            + "; ".join(f"{name}: {meant}" for name, meant in PLAN_GRANULARITIES.items()),
            "choices": list(PLAN_GRANULARITIES),
        },
    )

    def __post_init__(self) -> None:
        self.kind = current_value("kind", self.kind, OLD_KINDS, above=2)
        for name, number in (("budget", self.budget), ("spread", self.spread)):
            if isinstance(number, bool) or not isinstance(number, (int, float, type(None))):
                raise ValueError(f"{name}: expected a number, got {number!r}")
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ValueError(f"spread: expected a finite number of at least 0, got {self.spread}")
        check_choice("kind", self.kind, KINDS)
        check_choice("rule", self.rule, RULES)
        if self.granularity is not None:
            check_choice("granularity", self.granularity, PLAN_GRANULARITIES)


class AllocationFields(TypedDict, total=False):
    """Fields of `AllocationSettings` that `allocate` takes by name."""

    choices: Sequence[float] | None
    group: int | None
    rule: str
    granularity: str | None
