"""LayerAllocation: one sparsity, bit width, rank share or probability per layer, and the budget that they meet."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hf_cod.functional import budget as budgets
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import current_value, renamed
from hf_cod.io.exporting import Exportable
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import brief, limits
from hf_cod.io.settings import resolve
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.part_plans import groups_of, values_of_matrices
from hf_cod.scoring.search_results import check_search
from hf_cod.scoring.settings import (
    DEFAULT_SPREAD,
    GRANULARITIES,
    OLD_KINDS,
    AllocationFields,
    AllocationSettings,
    Kind,
)

logger = logging.getLogger(__name__)

DEFAULT_BITS = (3.0, 4.0)
# Upper bounds of values in a file, above those of any model.
MOST_BITS = 64
MOST_GROUP = 1 << 20
# Kind -> whether a layer that matters more gets a smaller value.
FALLING = {"sparsity": True, "bits": False, "rank": False, "parameter_share": False, "probability": False}


@checked
@dataclass(frozen=True)
class LayerAllocation(Exportable, JsonFile):
    """One value per layer, and the budget that the values meet.

    Attributes:
        kind: "sparsity" (share of zeros), "bits" (per weight), "rank" (share of the full rank that is kept),
            "parameter_share" (share of the weights that is kept) or "probability" (that a layer is sampled).
        budget: target for the mean of the values.
        values: one per layer, starting with layer 0.
        parameters: the weight of each layer in that mean.
        method: the score that the values follow.
        group: M of N:M sparsity, so that each value is a multiple of 1 / M; else None.
        model: name of the scored model.
        sizes: number of weights in the matrices of each of its layers, used to reject the allocation on another model;
            None: unknown, no check.
        granularity: what has a value of its own: "layer", "block" (attention, MLP) or "module" (each matrix).
        modules: for blocks and matrices, name of each matrix -> its value; `values` are then the means of the layers.
        search: what `search_plan` says about the plan that it found; else empty.
    """

    FIELD = "allocation"
    RENAMED_VALUES: ClassVar[dict[str, dict[str, str]]] = {"kind": OLD_KINDS}

    kind: str = field(metadata=limits(choices=tuple(FALLING)))
    budget: float = field(metadata=limits(least=0))
    values: list[float] = field(metadata=limits(least=0))
    parameters: list[int] = field(metadata=limits(least=0, one_for_each="values"))
    method: str
    group: int | None = field(default=None, metadata=limits(least=2, most=MOST_GROUP))
    model: str = ""
    sizes: list[int] | None = field(default=None, metadata=limits(least=0, one_for_each="values"))
    granularity: str = field(default="layer", metadata=limits(choices=tuple(GRANULARITIES)))
    modules: dict[str, float] = field(default_factory=dict, metadata=limits(least=0))
    search: dict[str, Any] = field(default_factory=dict)

    def check_read(self) -> None:
        """Checks that shares are at most 1, and that values of N:M sparsity are multiples of 1 / M."""
        check_search(self.search)
        if (self.granularity == "layer") == bool(self.modules):
            raise ValueError(f"modules: expected some for block and module, none for layer, got {brief(self.modules)}")
        if not self.values or not sum(self.parameters):
            raise ValueError(f"parameters: expected weights of at least one layer, got {brief(self.parameters)}")
        most = MOST_BITS if self.kind == "bits" else 1
        for layer, value in enumerate((*self.values, self.budget)):
            if value > most + 1e-9:  # means are off by rounding errors
                name = f"values[{layer}]" if layer < len(self.values) else "budget"
                raise ValueError(f"{name}: expected {self.kind} in 0..{most}, got {value}")
        for matrix, value in self.modules.items():
            if value > most + 1e-9:
                raise ValueError(f"modules[{matrix!r}]: expected {self.kind} in 0..{most}, got {value}")
        if self.group is not None:
            self._check_group(self.group)

    def _check_group(self, group: int) -> None:
        if self.kind != "sparsity":
            raise ValueError(f"group: expected none for {self.kind}, got {group}")
        places = self.modules.items() if self.modules else enumerate(self.values)
        name = "modules" if self.modules else "values"
        for place, value in places:
            zeros = value * group
            if abs(zeros - round(zeros)) > 1e-6 or round(zeros) == group:
                raise ValueError(f"{name}[{place!r}]: expected n / {group} with n < {group}, got {value}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current_value("kind", self.kind, OLD_KINDS, above=2))

    @property
    def mean(self) -> float:
        """Mean of the values weighted by parameters: the budget, or for discrete values an approximation of it."""
        return sum(v * n for v, n in zip(self.values, self.parameters, strict=True)) / sum(self.parameters)

    @property
    def patterns(self) -> list[tuple[int, int]]:
        """(N, M) of each layer: N of every M weights are kept.

        Raises:
            ValueError: not an N:M allocation, or one whose matrices have patterns of their own.
        """
        if self.modules:
            raise ValueError(f"granularity: expected layer, got {self.granularity}; pattern(value) is that of a matrix")
        return [self.pattern(value) for value in self.values]

    def pattern(self, value: float) -> tuple[int, int]:
        """(N, M) of a value.

        Raises:
            ValueError: not an N:M allocation.
        """
        if self.group is None:
            raise ValueError("group: expected an allocation of N:M sparsity, got none; allocate with group=M")
        return self.group - round(value * self.group), self.group


def same_share(stack: DecoderLayers, share: float) -> LayerAllocation:
    """Each layer keeps the same share of its weights.

    Raises:
        ValueError: share out of 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"plan: expected a share of parameters in 0..1, got {share}")
    sizes = sizes_of(stack)
    return LayerAllocation(
        "parameter_share", share, [float(share)] * len(sizes), sizes, "uniform", model=name_of(stack), sizes=sizes
    )


@renamed(parameters="layer_parameters")
@checked
def allocate(
    scores: LayerScores,
    kind: Kind | None = None,
    budget: float | None = None,
    spread: float | None = None,
    *,
    layer_parameters: Sequence[int] | None = None,
    settings: AllocationSettings | None = None,
    **fields: Unpack[AllocationFields],
) -> LayerAllocation:
    """Distributes a budget over layers: layers that matter more are pruned less, or get more bits, rank, probability.

    Values follow the scores linearly within [budget - spread, budget + spread] (`functional.budget.spread`), and their
    mean weighted by parameters is the budget. Discrete values (choices, N:M) are rounded from these: each by less than
    one step, so they may leave the interval by that; they keep the order of the scores, and the error of their mean is
    at most half a step of the largest layer. N:M keeps at least one weight of M in each layer.

    Args:
        scores: from `score_layers`.
        kind: see `LayerAllocation`; default: sparsity.
        budget: mean of the values: in [0, 1] for shares and probability, or between the choices; for N:M at most
            1 - 1 / M; default: 0.5.
        spread: lambda; default: the best one that the method `auto` found, else 0.08; reduced if the budget is nearer
            than that to 0, to 1 or to an end of the choices. Not for bits, which are spread over the choices.
        layer_parameters: weight of each layer in the mean; default: `scores.parameters`.
        settings: how the budget is distributed.
        **fields: or fields of `AllocationSettings` by name: `choices`, the allowed values, rising (default for bits: 3
            and 4, else any); `group`, for N:M sparsity with this M and a separate N for each layer; `rule`, "bounded"
            (as described above) or "authors", OWL's released formula, which keeps neither the interval nor the weighted
            mean (`functional.budget.authors_sparsity`); `granularity`, what gets a value of its own: "layer", "block"
            or "module". The latter two require scores of the same granularity. All matrices that engines fuse (query,
            key and value; gate and up) get the same bits.

    Raises:
        ValueError: a budget, spread, group or choice out of range.
    """
    kind = current_value("kind", kind, OLD_KINDS, above=2)
    chosen = resolve(allocate, AllocationSettings, settings, fields, kind=kind, budget=budget, spread=spread)
    mean, lam, group, rule = chosen.budget, chosen.spread, chosen.group, chosen.rule
    granularity = _granularity(scores, chosen.granularity, layer_parameters)
    groups = [] if granularity == "layer" else groups_of(scores, fuses=chosen.kind == "bits")
    weights = _weights(scores, layer_parameters)
    places = torch.tensor([group.weights for group in groups], dtype=torch.float64) if groups else weights
    choices = _choices(chosen.kind, mean, chosen.choices, group)
    _check_target(scores, chosen.kind, mean)
    D = torch.tensor([group.value for group in groups] if groups else scores.values, dtype=torch.float64)
    if chosen.kind == "bits":
        if lam is not None or rule != "bounded":
            raise ValueError("spread: expected none for bits, which are spread over the choices, and the rule bounded")
        assert choices is not None
        values = budgets.spread(D, places, mean, choices[0], choices[-1], falling=False)
    else:
        ends = (choices[0], choices[-1]) if choices else (0.0, 1.0)
        lam = _lambda(mean, lam, scores.settings.get("spread", DEFAULT_SPREAD), *ends)
        values = _shares(D, places, chosen.kind, mean, lam, rule)
    if choices is not None:
        values = budgets.round_to(values, choices, places, first=-D if FALLING[chosen.kind] else D)
    counted, found = weights.long().tolist(), values.tolist()
    modules: dict[str, float] = {}
    if groups:
        modules, found = values_of_matrices(scores, groups, found, mean)
    made_for = (scores.model, list(scores.parameters))
    return LayerAllocation(chosen.kind, mean, found, counted, scores.method, group, *made_for, granularity, modules)


def _shares(D: Tensor, weights: Tensor, kind: str, budget: float, lam: float, rule: str) -> Tensor:
    if rule == "bounded":
        return budgets.spread(D, weights, budget, budget - lam, budget + lam, FALLING[kind])
    if kind != "sparsity":
        raise ValueError(f"rule: expected bounded for {kind}, got {rule!r}, which is a formula of sparsity")
    values = budgets.authors_sparsity(D, budget, lam)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"spread: expected one that leaves each sparsity in 0..1, got {lam}, which gives "
            f"{float(values.min()):.4g} to {float(values.max()):.4g}"
        )
    return values


def _granularity(scores: LayerScores, granularity: str | None, layer_parameters: Sequence[int] | None) -> str:
    """What gets a value of its own: as given, else what has a score of its own."""
    granularity = granularity or scores.granularity
    if granularity not in ("layer", scores.granularity):
        raise ValueError(
            f"granularity: expected {scores.granularity} with these scores, got {granularity}; "
            f"score_layers(..., granularity={granularity!r}) scores parts, with a method that measures them"
        )
    if granularity != "layer" and layer_parameters is not None:
        raise ValueError(f"layer_parameters: expected none with granularity {granularity}, got {layer_parameters}")
    return granularity


def _weights(scores: LayerScores, parameters: Sequence[int] | None) -> Tensor:
    found = scores.parameters if parameters is None else list(parameters)
    if len(found) != len(scores.values) or min(found) < 0 or not 0 < sum(found) < math.inf:
        raise ValueError(f"layer_parameters: expected {len(scores.values)} counts, one per layer, got {found}")
    return torch.tensor(found, dtype=torch.float64)


def _choices(kind: str, budget: float, choices: Sequence[float] | None, group: int | None) -> list[float] | None:
    """The allowed discrete values, None for any; checks them and the budget."""
    if group is not None:
        if kind != "sparsity" or choices is not None or type(group) is not int or group < 2:
            raise ValueError(f"group: expected at least 2, for sparsity without choices, got {group} for {kind}")
        choices = [n / group for n in range(group)]  # not 1, which would remove all weights of a layer
    if kind == "bits":
        choices = choices or DEFAULT_BITS
    if choices is not None and (not choices or any(not a < b for a, b in pairwise(choices))):
        raise ValueError(f"choices: expected rising values, got {choices}")
    low, high = (choices[0], choices[-1]) if choices else (0.0, 1.0)
    if kind != "bits" and (low < 0 or high > 1):
        raise ValueError(f"choices: expected values in 0..1, got {choices}")
    if not low <= budget <= high:
        more = "" if group is None else f" (one weight of {group} is kept in each layer); use a larger group"
        raise ValueError(f"budget: expected {kind} in {low:g}..{high:g}, got {budget}{more}")
    return None if choices is None else list(choices)


def _check_target(scores: LayerScores, kind: str, budget: float) -> None:
    """Warns if the scores were measured around another sparsity than the budget."""
    target = scores.settings.get("target")
    if kind == "sparsity" and target is not None and abs(target - budget) > 1e-6:
        logger.warning("scores: %s measured them at sparsity %g, but the budget is %g", scores.method, target, budget)


def _lambda(budget: float, spread: float | None, default: float, low: float, high: float) -> float:
    room = min(budget - low, high - budget)
    if spread is None:
        return min(default, room)
    # A tolerance for rounding errors: in floats 1 - 0.7 is less than 0.3.
    if not 0 <= spread <= room + 1e-9:
        bounds = f"{low:g}..{high:g}"
        raise ValueError(f"spread: expected 0..{room:.4g}, so that {budget} -+ spread is in {bounds}, got {spread}")
    return min(spread, room)
