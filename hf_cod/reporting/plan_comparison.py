"""Comparison of scores and plans of one model, also those of other tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from hf_cod.functional.depth import spearman
from hf_cod.io.arguments import checked
from hf_cod.io.markdown import escaped
from hf_cod.io.report import format_number
from hf_cod.scoring.allocation import FALLING, LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores

Compared = LayerScores | LayerAllocation


@dataclass(frozen=True)
class PlanComparison:
    """Scores and plans of one model side by side.

    Attributes:
        plans: the scores and plans.
        labels: one name for each.
        columns: header of the summary table.
        rows: one row per figure, starting with the name of the figure.
        layers: one row per layer, starting with its index: the scores or values.
        verdict: which of them agree most and least, in sentences.
    """

    plans: list[Compared]
    labels: list[str]
    columns: list[str]
    rows: list[list[str]]
    layers: list[list[str]]
    verdict: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """The summary table, the verdict and the table of layers as a Markdown page."""
        lines = ["# compare: " + " / ".join(map(escaped, self.labels)), "", *_table(self.columns, self.rows), ""]
        lines += [f"- {escaped(sentence)}" for sentence in self.verdict]
        lines += ["", "## Layers", "", *_table(["layer", *self.labels], self.layers)]
        return "\n".join(lines) + "\n"


@checked
def compare_plans(
    plans: Sequence[LayerScores | LayerAllocation], labels: Sequence[str] | None = None
) -> PlanComparison:
    """Compares scores and plans of one model: by how much they agree which layers and which matrices matter more.

    Agreement is Spearman's rank correlation over the layers, and over the matrices if both have values of matrices or
    blocks; 0 if one of them has the same value everywhere. In a plan of sparsity, a lower value means that a layer
    matters more. Plans of one kind also have the share of the matrices, or without those of the layers, with one value.

    Args:
        plans: at least two; `import_scores` and `import_plan` read those of other tools.
        labels: one name for each; default: their methods.

    Raises:
        ValueError: fewer than two, different models, or a wrong number of labels.
    """
    if len(plans) < 2:
        raise ValueError(f"plans: expected at least two, got {len(plans)}")
    names = [plan.method for plan in plans] if labels is None else list(labels)
    if len(names) != len(plans):
        raise ValueError(f"labels: expected {len(plans)}, one for each plan, got {len(names)}")
    for plan in plans[1:]:
        _check_same_model(plans[0], plan)
    rows = [[title, *[figure(plan) for plan in plans]] for title, figure in _FIGURES.items()]
    for index, (other, name) in enumerate(zip(plans, names, strict=True)):
        for title, agreement in _AGREEMENTS.items():
            found = ["-" if place == index else format_number(agreement(one, other)) for place, one in enumerate(plans)]
            if {*found} != {"-"}:
                rows.append([f"{title} {name}", *found])
    layers = [
        [str(index), *[format_number(plan.values[index]) for plan in plans]] for index in range(len(plans[0].values))
    ]
    return PlanComparison([*plans], names, ["", *names], rows, layers, _verdict(plans, names))


def _check_same_model(first: Compared, other: Compared) -> None:
    """Checks numbers of layers and of weights, as far as both are known."""
    if len(first.values) != len(other.values):
        raise ValueError(
            f"plans: expected those of one model, got {len(first.values)} layers ({first.model or first.method}) and "
            f"{len(other.values)} ({other.model or other.method})"
        )
    sizes = [plan.parameters if isinstance(plan, LayerScores) else plan.sizes for plan in (first, other)]
    if sizes[0] is not None and sizes[1] is not None and sizes[0] != sizes[1]:
        layer = next(i for i, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b)
        raise ValueError(
            f"plans: expected those of one model, got {sizes[0][layer]} and {sizes[1][layer]} weights in layer {layer}"
        )


def _sign(plan: Compared) -> int:
    return -1 if isinstance(plan, LayerAllocation) and FALLING[plan.kind] else 1


def _of_matrices(plan: Compared) -> dict[str, float]:
    """Matrix -> its value; empty if layers have values."""
    if isinstance(plan, LayerAllocation):
        return plan.modules
    return {name: part.value for part in plan.parts for name in part.sizes}


def _by_layer(one: Compared, other: Compared) -> float:
    a, b = (_sign(plan) * torch.tensor(plan.values, dtype=torch.float64) for plan in (one, other))
    return round(spearman(a, b), 3)


def _by_matrix(one: Compared, other: Compared) -> float | None:
    a, b = _of_matrices(one), _of_matrices(other)
    both = [name for name in a if name in b]
    if not both:
        return None
    first, second = (torch.tensor([of[name] for name in both], dtype=torch.float64) for of in (a, b))
    return round(spearman(_sign(one) * first, _sign(other) * second), 3)


def _equal(one: Compared, other: Compared) -> float | None:
    """Share of the matrices (of the layers, without matrices) with one value in both plans."""
    if not isinstance(one, LayerAllocation) or not isinstance(other, LayerAllocation) or one.kind != other.kind:
        return None
    if one.modules and other.modules:
        both = [(value, other.modules[name]) for name, value in one.modules.items() if name in other.modules]
    else:
        both = [*zip(one.values, other.values, strict=True)]
    return round(sum(abs(a - b) < 1e-6 for a, b in both) / len(both), 3) if both else None


def _content(plan: Compared) -> str:
    kind = f"plan of {plan.kind}" if isinstance(plan, LayerAllocation) else "scores"
    return f"{kind} by {plan.granularity} ({plan.method})"


def _mean(plan: Compared) -> str:
    return format_number(round(plan.mean, 6)) if isinstance(plan, LayerAllocation) else "-"


def _place(most: bool) -> Callable[[Compared], str]:
    def of(plan: Compared) -> str:
        values = [_sign(plan) * value for value in plan.values]
        return str(values.index(max(values) if most else min(values)))

    return of


def _verdict(plans: Sequence[Compared], names: list[str]) -> list[str]:
    found = [(_by_layer(plans[i], plans[j]), names[i], names[j]) for i, j in combinations(range(len(plans)), 2)]
    told = {"most": max(found)} | ({"least": min(found)} if len(found) > 1 else {})
    return [
        f"{a} and {b} agree {how} about the layers: rank correlation {format_number(value)}."
        for how, (value, a, b) in told.items()
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(escaped, columns)) + " |", "|---" * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)]


# Figure -> function that reads it.
_FIGURES: dict[str, Callable[[Compared], str]] = {
    "content": _content,
    "mean of the plan": _mean,
    "layer that matters most": _place(most=True),
    "layer that matters least": _place(most=False),
}
# Figure of a pair -> function of both; None if it does not apply.
_AGREEMENTS: dict[str, Callable[[Compared, Compared], float | None]] = {
    "rank correlation of layers with": _by_layer,
    "rank correlation of matrices with": _by_matrix,
    "share of equal values with": _equal,
}
