"""LayerAllocation: one sparsity, bit width, rank share or probability per layer, and the budget that they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from hf_cod.scoring.budget_checks import check_target, choices_of, granularity_of, spread_within, weights_of
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.part_plans import (
    groups_of,
    scores_and_weights,
    values_of_matrices,
    values_with_experts,
    weights_of_parts,
)
from hf_cod.scoring.search_results import check_search
from hf_cod.scoring.settings import (
    DEFAULT_SPREAD,
    EXPERT,
    OLD_KINDS,
    PLAN_GRANULARITIES,
    AllocationFields,
    AllocationSettings,
    Kind,
)

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
        granularity: what has a value of its own: "layer", "block" (attention, MLP), "module" (each matrix) or "expert".
        modules: for blocks and matrices, name of each matrix -> its value; `values` are then the means of the layers.
        search: what `search_plan` says about the plan that it found; else empty.
        experts: for experts, name of the experts, as in `ExpertScores` -> the value of each; `values` are then the
            means of the layers.
        common: for experts, the value of all other matrices of each layer (attention, shared experts).
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
    granularity: str = field(default="layer", metadata=limits(choices=tuple(PLAN_GRANULARITIES)))
    modules: dict[str, float] = field(default_factory=dict, metadata=limits(least=0))
    search: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, list[float]] = field(default_factory=dict, metadata=limits(least=0))
    common: list[float] = field(default_factory=list, metadata=limits(least=0))

    def check_read(self) -> None:
        """Checks that shares are at most 1, and that values of N:M sparsity are multiples of 1 / M."""
        check_search(self.search)
        if (self.granularity in ("layer", EXPERT)) == bool(self.modules):
            raise ValueError(f"modules: expected some for block and module, else none, got {brief(self.modules)}")
        wanted = (True, len(self.values)) if self.granularity == EXPERT else (False, 0)
        if (bool(self.experts), len(self.common)) != wanted:
            got = f"{len(self.experts)} and {len(self.common)} for {self.granularity}"
            raise ValueError(f"experts: expected some, and common of each layer, for expert, else none, got {got}")
        if not self.values or not sum(self.parameters):
            raise ValueError(f"parameters: expected weights of at least one layer, got {brief(self.parameters)}")
        most = MOST_BITS if self.kind == "bits" else 1
        for layer, value in enumerate((*self.values, self.budget)):
            if value > most + 1e-9:  # means are off by rounding errors
                name = f"values[{layer}]" if layer < len(self.values) else "budget"
                raise ValueError(f"{name}: expected {self.kind} in 0..{most}, got {value}")
        for name, value in self._of_parts():
            if value > most + 1e-9:
                raise ValueError(f"{name}: expected {self.kind} in 0..{most}, got {value}")
        if self.group is not None:
            self._check_group(self.group)

    def _check_group(self, group: int) -> None:
        if self.kind != "sparsity":
            raise ValueError(f"group: expected none for {self.kind}, got {group}")
        of_layers = [(f"values[{layer}]", value) for layer, value in enumerate(self.values)]
        for name, value in of_layers if self.granularity == "layer" else self._of_parts():
            zeros = value * group
            if abs(zeros - round(zeros)) > 1e-6 or round(zeros) == group:
                raise ValueError(f"{name}: expected n / {group} with n < {group}, got {value}")

    def _of_parts(self) -> list[tuple[str, float]]:
        """(place in a file, value) of matrices, of experts and of what all tokens enter."""
        of_matrices = [(f"modules[{name!r}]", value) for name, value in self.modules.items()]
        of_experts = [(f"experts[{n!r}][{e}]", v) for n, found in self.experts.items() for e, v in enumerate(found)]
        return [*of_matrices, *of_experts, *((f"common[{layer}]", v) for layer, v in enumerate(self.common))]

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
            ValueError: not an N:M allocation, or one whose matrices or experts have patterns of their own.
        """
        if self.granularity != "layer":
            raise ValueError(f"granularity: expected layer, got {self.granularity}; pattern(value) is that of a part")
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
    expert_scores: ExpertScores | None = None,
    settings: AllocationSettings | None = None,
    **fields: Unpack[AllocationFields],
) -> LayerAllocation:
    """Distributes a budget over layers: layers that matter more are pruned less, or get more bits, rank, probability.

    Values follow the scores linearly within [budget - spread, budget + spread] (`functional.budget.spread`), and their
    mean weighted by parameters is the budget. Discrete values (choices, N:M) are rounded from these: each by less than
    one step, so they may leave the interval by that; they keep the order of the scores, and the error of their mean is
    at most half a step of the largest layer. N:M keeps at least one weight of M in each layer.

    With scores of experts, there are two such plans with the same budget and interval: one of all experts of the model
    by their scores, and one of the other weights of each layer (attention, shared experts) by the scores of the layers.

    Args:
        scores: from `score_layers`.
        kind: see `LayerAllocation`; default: sparsity.
        budget: mean of the values: in [0, 1] for shares and probability, or between the choices; for N:M at most
            1 - 1 / M; default: 0.5.
        spread: lambda; default: the best one that the method `auto` found, else 0.08; reduced if the budget is nearer
            than that to 0, to 1 or to an end of the choices. Not for bits, which are spread over the choices.
        layer_parameters: weight of each layer in the mean; default: `scores.parameters`.
        expert_scores: of the same model, from `score_experts`; for sparsity, parameter_share and rank. For bits, pass
            them to `plan_bits` or `OwlBnbConfig`.
        settings: how the budget is distributed.
        **fields: or fields of `AllocationSettings` by name: `choices`, the allowed values, rising (default for bits: 3
            and 4, else any); `group`, for N:M sparsity with this M and a separate N for each layer; `rule`, "bounded"
            (as described above) or "authors", OWL's released formula, which keeps neither the interval nor the weighted
            mean (`functional.budget.authors_sparsity`); `granularity`, what gets a value of its own: "layer", "block",
            "module" or "expert". Block and module require scores of the same granularity, expert requires
            `expert_scores`. All matrices that engines fuse (query, key and value; gate and up) get the same bits.

    Raises:
        ValueError: a budget, spread, group or choice out of range; scores of experts of another model.
    """
    kind = current_value("kind", kind, OLD_KINDS, above=2)
    chosen = resolve(allocate, AllocationSettings, settings, fields, kind=kind, budget=budget, spread=spread)
    granularity = granularity_of(scores, chosen, layer_parameters, expert_scores)
    groups = [] if granularity in ("layer", EXPERT) else groups_of(scores, fuses=chosen.kind == "bits")
    weights = weights_of(scores, layer_parameters)
    places = weights_of_parts(scores, groups, expert_scores) if groups or expert_scores else weights
    choices = choices_of(chosen.kind, chosen.budget, chosen.choices, chosen.group)
    check_target(scores, chosen.kind, chosen.budget)
    lam = _lambda(scores, chosen, choices)
    D = torch.tensor([group.value for group in groups] if groups else scores.values, dtype=torch.float64)
    found = _distributed(D, places, chosen, lam, choices)
    modules: dict[str, float] = {}
    if groups:
        modules, found = values_of_matrices(scores, groups, found, chosen.budget)
    of_layers = (found, weights.long().tolist(), scores.method, chosen.group)
    made_for = (scores.model, list(scores.parameters), granularity, modules)
    plan = LayerAllocation(chosen.kind, chosen.budget, *of_layers, *made_for)
    if expert_scores is None:
        return plan
    own = _distributed(*scores_and_weights(expert_scores), chosen, lam, choices)
    experts, means = values_with_experts(found, plan.parameters, expert_scores, own)
    method = f"{scores.method}, experts by {expert_scores.method}"
    return replace(plan, method=method, values=means, experts=experts, common=found)


def _lambda(scores: LayerScores, chosen: AllocationSettings, choices: Sequence[float] | None) -> float:
    """Half the width of the interval of the values; bits, whose interval is that of the choices, have none."""
    if chosen.kind != "bits":
        ends = (choices[0], choices[-1]) if choices else (0.0, 1.0)
        return spread_within(chosen.budget, chosen.spread, scores.settings.get("spread", DEFAULT_SPREAD), *ends)
    if chosen.spread is not None or chosen.rule != "bounded":
        raise ValueError("spread: expected none for bits, which are spread over the choices, and the rule bounded")
    return 0.0


def _distributed(
    D: Tensor, weights: Tensor, chosen: AllocationSettings, lam: float, choices: Sequence[float] | None
) -> list[float]:
    """The budget over parts with these scores and weights."""
    falling = FALLING[chosen.kind]
    if chosen.kind == "bits":
        assert choices is not None
        values = budgets.spread(D, weights, chosen.budget, choices[0], choices[-1], falling)
    else:
        values = _shares(D, weights, chosen.kind, chosen.budget, lam, chosen.rule)
    if choices is not None:
        values = budgets.round_to(values, choices, weights, first=-D if falling else D)
    return values.tolist()


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
