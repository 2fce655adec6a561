"""RankPlan: which matrices are factorized, and to which rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from hf_cod.functional.ranks import Shape, count, most_rank, rank_of_share, rank_of_weights
from hf_cod.functional.sparse_low_rank import sizes_of_weights
from hf_cod.io.deprecation import current_value
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import limits
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.orientation import is_plain, shape_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.settings import OLD_KINDS

KINDS = ("parameter_share", "rank")


@dataclass(frozen=True)
class RankPlan(JsonFile):
    """What each matrix gets.

    Attributes:
        kind: what the budget counts: "parameter_share" (of the weights of the layers' matrices, that is kept) or
            "rank" (mean share of full rank, weighted by parameters, had all matrices been cut to it).
        budget: the share that was to be kept.
        ranks: name -> rank of each matrix that is factorized; all others stay whole.
        method: which score or spectrum they follow.
        nonzeros: name -> entries that the sparse part beside its factors keeps; 0 where there is none.
        model: the name of the model that it was made for.
        sizes: weights in each of its layers' matrices, by which a plan of another model is known; None: not known.
    """

    FIELD = "rank_plan"
    RENAMED_VALUES: ClassVar[dict[str, dict[str, str]]] = {"kind": OLD_KINDS}

    kind: str = field(metadata=limits(choices=KINDS))
    budget: float = field(metadata=limits(least=0, most=1))
    ranks: dict[str, int] = field(metadata=limits(least=1))
    method: str
    nonzeros: dict[str, int] = field(default_factory=dict, metadata=limits(least=0))
    model: str = ""
    sizes: list[int] | None = field(default=None, metadata=limits(least=0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current_value("kind", self.kind, OLD_KINDS, above=1))


def factorizable(stack: DecoderLayers, index: int) -> dict[str, Shape]:
    """Name -> (out, in) of each matrix of a layer that two factors can be smaller than: Linears and Conv1D. Banks of
    experts stay whole.
    """
    shapes = {name: shape_of(m) for name, m in stack.linears(index).items() if is_plain(m)}
    return {name: shape for name, shape in shapes.items() if most_rank(shape)}


def least_weights(stack: DecoderLayers, index: int) -> int:
    """Weights of a layer's matrices with rank 1 wherever that saves."""
    shapes = factorizable(stack, index).values()
    return stack.count_weights(index) - sum(count(shape, None) - count(shape, 1) for shape in shapes)


def experts_told(stack: DecoderLayers) -> str:
    """A part of a sentence on why so much stays, where banks of experts do."""
    return "; banks of experts stay whole" if any(stack.experts(index) for index in range(len(stack))) else ""


def plan_of_allocation(stack: DecoderLayers, allocation: LayerAllocation, rank_share: float | None = None) -> RankPlan:
    """Ranks by which each layer keeps its share: all its matrices the same share of their rank, or of their weights.

    Args:
        stack: the layers.
        allocation: of "parameter_share" or "rank".
        rank_share: of the weights that a matrix keeps, the part that its factors have; the rest is sparse, and the
            allocation one of "parameter_share". None: all of them.

    Raises:
        ValueError: an allocation of another kind or for another model; a share out of reach (says the least possible).
    """
    kinds = KINDS if rank_share is None else KINDS[:1]
    if allocation.kind not in kinds:
        raise ValueError(f"plan: expected an allocation of {' or '.join(kinds)}, got one of {allocation.kind}")
    if len(allocation.values) != len(stack):
        raise ValueError(f"plan: expected {len(stack)} values, one a layer, got {len(allocation.values)}")
    check_sizes("plan", allocation.model, allocation.sizes, stack)
    ranks: dict[str, int] = {}
    nonzeros: dict[str, int] = {}
    for index, share in enumerate(allocation.values):
        if not 0 <= share <= 1 or math.isnan(share):
            raise ValueError(f"plan: expected shares in 0..1, got {share} in layer {index}")
        rank_of = rank_of_share
        if allocation.kind == "parameter_share":
            share, rank_of = _share_of_matrices(stack, index, share), rank_of_weights
        if rank_share is not None:
            sizes = {n: sizes_of_weights(shape, share, rank_share) for n, shape in factorizable(stack, index).items()}
            ranks |= {name: size[0] for name, size in sizes.items() if size is not None}
            nonzeros |= {name: size[1] for name, size in sizes.items() if size is not None}
            continue
        found = {name: rank_of(shape, share) for name, shape in factorizable(stack, index).items()}
        ranks |= {name: rank for name, rank in found.items() if rank is not None}
    made_for = (name_of(stack), sizes_of(stack))
    return RankPlan(allocation.kind, allocation.budget, ranks, allocation.method, nonzeros, *made_for)


def _share_of_matrices(stack: DecoderLayers, index: int, share: float) -> float:
    """What the matrices that can be factorized keep, so that with all others the layer keeps `share`."""
    total, least = stack.count_weights(index), least_weights(stack, index)
    # Shares that follow from a sum are off by rounding errors.
    if share * total < least - 1e-6 * total:
        raise ValueError(
            f"parameter_share: expected at least {math.ceil(1e4 * least / total) / 1e4:g} in layer {index}, which is "
            f"rank 1 wherever that saves{experts_told(stack)}, got {share:.4g}"
        )
    flexible = sum(count(shape, None) for shape in factorizable(stack, index).values())
    return 1.0 if not flexible else 1 - (1 - share) * total / flexible


def check_ranks(stack: DecoderLayers, plan: RankPlan) -> None:
    """Makes sure that these are ranks, and sparse parts beside them, of matrices of that model, and that they save.

    Raises:
        ValueError: a plan for another model; says which matrix is not there, or which rank or how many entries it may
            have.
    """
    check_sizes("plan", plan.model, plan.sizes, stack)
    shapes = {name: shape for index in range(len(stack)) for name, shape in factorizable(stack, index).items()}
    for name, rank in plan.ranks.items():
        if name not in shapes:
            raise ValueError(f"ranks: expected matrices of {type(stack.model).__name__}, got {name!r}")
        m, n = shapes[name]
        if type(rank) is not int or not 1 <= rank <= most_rank((m, n)):
            raise ValueError(
                f"ranks: expected 1..{most_rank((m, n))} of {name}, whose factors have fewer weights than its "
                f"{m} x {n} then, got {rank}"
            )
        most, kept = m * n - count((m, n), rank) - 1, plan.nonzeros.get(name, 0)
        if type(kept) is not int or not 0 <= kept <= most:
            raise ValueError(
                f"nonzeros: expected 0..{most} of {name}, which with rank {rank} are fewer than its {m} x {n}, "
                f"got {kept}"
            )
    unknown = next((name for name in plan.nonzeros if name not in plan.ranks), None)
    if unknown is not None:
        raise ValueError(f"nonzeros: expected matrices that have a rank, got {unknown!r}")
    if not plan.ranks:
        raise ValueError("plan: expected ranks at which factors have fewer weights than a matrix, got none; keep less")
