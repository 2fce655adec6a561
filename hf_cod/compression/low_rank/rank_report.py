"""The report of `factorize`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hf_cod.compression.low_rank.rank_plan import RankPlan, factorizable, not_factorizable
from hf_cod.functional.damping import LEAST_TOKENS
from hf_cod.functional.ranks import count, full_rank
from hf_cod.io.report import RunReport
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.size import count_parameters
from hf_cod.layers.stack import DecoderLayers

_OF_ZEROS = (
    "{:,} of them are in sparse parts. The zeros of these parts are not counted here; they are stored until the model "
    "is packed (hf-cod pack --min-sparsity, or pack_sparse)."
)


class RankReporter:
    """Records the sizes of a model before it is factorized, and makes the report afterwards.

    Args:
        stack: the layers.
        name: the model's name, or None.
        basis: what the experts of a bank have in common.
        notes: for the report.
    """

    def __init__(self, stack: DecoderLayers, name: str | None, basis: str, notes: Sequence[str] = ()) -> None:
        self.stack = stack
        self.name = name or name_of(stack)
        left = {name: why for index in range(len(stack)) for name, why in not_factorizable(stack, index).items()}
        self.notes = [*notes, *(f"{name} is not factorized: {reason}" for name, reason in left.items())]
        self.shapes = [factorizable(stack, index, basis) for index in range(len(stack))]
        self.sizes = sizes_of(stack)
        self.parameters = count_parameters(stack.model)

    def report(self, plan: RankPlan, finished: FinishedLayers, settings: dict[str, Any]) -> RunReport:
        """Counts the remaining weights, and makes the report."""
        saved = [_saved(shapes, plan) for shapes in self.shapes]
        cut = [_rank_weights(shapes, plan.ranks) for shapes in self.shapes]
        errors = [list(finished.notes[index]["errors"].values()) for index in range(len(self.stack))]
        total = sum(self.sizes)
        kept, rank = 1 - sum(saved) / total, 1 - sum(cut) / total
        return RunReport(
            kind="factorize",
            model=self.name,
            settings=settings,
            environment=environment_of(self.stack.model),
            layers={
                "parameter_share": [1 - less / size for less, size in zip(saved, self.sizes, strict=True)],
                "full_rank_share": [1 - less / size for less, size in zip(cut, self.sizes, strict=True)],
                "error": [sum(found) / len(found) if found else 0.0 for found in errors],
                "parameters": self.sizes,
            },
            results={
                "parameter_share": kept,
                "full_rank_share": rank,
                "parameters": {"intact": self.parameters, "factorized": self.parameters - sum(saved)},
                "ranks": plan.ranks,
                **({"nonzeros": plan.nonzeros} if plan.nonzeros else {}),
            },
            summary=[
                f"{kept:.2%} of {total:,} weights in the layers' matrices are kept, {rank:.2%} of their rank; "
                f"{len(plan.ranks)} of {sum(map(len, self.shapes))} matrices are factorized.",
                *([_OF_ZEROS.format(sum(plan.nonzeros.values()))] if plan.nonzeros else []),
            ],
            notes=[*self.notes, *_told_tokens([finished.notes[index] for index in range(len(self.stack))])],
        )


def _told_tokens(notes: Sequence[Any]) -> list[str]:
    """Sentences on matrices that no token entered, and on experts that few tokens entered."""
    unseen = [name for note in notes for name in note["unseen"]]
    few = [name for note in notes for name in note.get("few", [])]
    plain = "factorized with method plain"
    bank = f"{plain}, or with the inputs of all experts of the bank"
    alone = [name for name in unseen if not _is_expert(name)]
    least = f"fewer tokens than 1/{1 / LEAST_TOKENS:g} of their input channels entered"
    return [
        *(f"no token entered {name}: {plain}" for name in alone),
        *(f"no token entered {told}: {bank}" for told in _by_bank(name for name in unseen if _is_expert(name))),
        *(f"{least} {told}: {bank}" for told in _by_bank(few)),
    ]


def _is_expert(name: str) -> bool:
    return name.rpartition(".")[2].isdecimal()


def _by_bank(names: Iterable[str]) -> list[str]:
    found = Counter(name.rpartition(".")[0] for name in names)
    return [f"{count} expert{'s' if count > 1 else ''} of {bank}" for bank, count in found.items()]


def _saved(shapes: dict[str, Any], plan: RankPlan) -> int:
    cut = {name: shape for name, shape in shapes.items() if name in plan.ranks}
    left = {name: count(shape, plan.ranks[name], plan.nonzeros.get(name, 0)) for name, shape in cut.items()}
    return sum(count(shape, None) - left[name] for name, shape in cut.items())


def _rank_weights(shapes: dict[str, Any], ranks: dict[str, int]) -> float:
    """The sum over matrices of the lost share of rank, times the number of weights."""
    lost = {name: 1 - ranks[name] / full_rank(shape) for name, shape in shapes.items() if name in ranks}
    return sum(share * math.prod(shapes[name]) for name, share in lost.items())
