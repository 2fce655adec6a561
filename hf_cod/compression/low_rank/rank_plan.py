"""RankPlan: the ranks of the matrices to factorize."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from hf_cod.compression.low_rank.experts import bank_matrices
from hf_cod.compression.low_rank.settings import EXPERT_BASES, OWN
from hf_cod.functional.ranks import Shape, count, most_rank, rank_of_share, rank_of_weights
from hf_cod.functional.sparse_low_rank import sizes_of_weights
from hf_cod.io.deprecation import current_value
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import limits
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.orientation import is_plain, shape_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.part_plans import check_names_of_matrices, values_of_parts
from hf_cod.scoring.settings import OLD_KINDS

KINDS = ("parameter_share", "rank")


@dataclass(frozen=True)
class RankPlan(JsonFile):
    """The rank of each matrix to factorize.

    Attributes:
        kind: unit of the budget: "parameter_share" (the kept share of the weights of the layers' matrices) or "rank"
            (mean share of full rank, weighted by parameters, as if all matrices were cut to it).
        budget: the share to keep.
        ranks: name -> rank of each matrix to factorize; all others are left unchanged.
        method: the score or spectrum by which ranks were chosen.
        nonzeros: name -> number of entries of the sparse part; 0 where there is none.
        model: the name of the model for which the plan was made.
        sizes: weights in the matrices of each layer, to detect a plan for another model; None: unknown.
        expert_basis: what the experts of a bank have in common, a key of `settings.EXPERT_BASES`.
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
    expert_basis: str = field(default=OWN, metadata=limits(choices=tuple(EXPERT_BASES)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current_value("kind", self.kind, OLD_KINDS, above=1))


def factorizable(stack: DecoderLayers, index: int, basis: str) -> dict[str, Shape]:
    """Name -> shape of each matrix of a layer whose factors can have fewer weights: (out, in) of a Linear or Conv1D,
    and that of `BankMatrix` for the matrices of a bank of experts. The matrices of `not_factorizable` are excluded.
    """
    excluded = not_factorizable(stack, index)
    shapes: dict[str, Shape] = {name: shape_of(m) for name, m in stack.linears(index).items()}
    shapes |= {name: bank.shape for name, bank in bank_matrices(stack, index, basis).items()}
    return {name: shape for name, shape in shapes.items() if name not in excluded and most_rank(shape)}


def not_factorizable(stack: DecoderLayers, index: int) -> dict[str, str]:
    """Name -> the reason why a matrix of a layer cannot be replaced by factors, whatever its shape."""
    use = direct_use(stack.model)
    found: dict[str, str] = {}
    for name, module in stack.linears(index).items():
        if not is_plain(module):
            found[name] = f"a {type(module).__name__}, which computes something else than a Linear"
        elif name in use.reasons:
            found[name] = use.reasons[name]
    names = [matrix.name for matrix in stack.expert_matrices(index)]
    return found | {name: use.unpackable[name] for name in names if name in use.unpackable}


def least_weights(stack: DecoderLayers, index: int, basis: str) -> int:
    """The number of weights of a layer's matrices at rank 1, wherever that is smaller."""
    shapes = factorizable(stack, index, basis).values()
    return stack.count_weights(index) - sum(count(shape, None) - count(shape, 1) for shape in shapes)


def experts_told(stack: DecoderLayers) -> str:
    """The part of an error message that names excluded banks of experts, if there are any."""
    banks = {bank for index in range(len(stack)) for bank in stack.experts(index)}
    shapes = [factorizable(stack, index, OWN) for index in range(len(stack))]
    factorized = {name.rpartition(".")[0] for layer in shapes for name in layer}
    return "; banks of experts are excluded" if banks - factorized else ""


def plan_of_allocation(
    stack: DecoderLayers, allocation: LayerAllocation, factor_share: float | None = None, basis: str = OWN
) -> RankPlan:
    """Ranks with which each layer keeps its share; all matrices of a layer keep the same share of rank or of weights.

    Args:
        stack: the layers.
        allocation: of "parameter_share" or "rank".
        factor_share: the part of a matrix's kept weights that is in the factors; the rest is in a sparse part. It
            requires an allocation of "parameter_share". None: all weights are in the factors.
        basis: what the experts of a bank have in common.

    Raises:
        ValueError: an allocation of another kind or for another model; a share out of range (says the least possible).
    """
    kinds = KINDS if factor_share is None else KINDS[:1]
    if allocation.kind not in kinds:
        raise ValueError(f"plan: expected an allocation of {' or '.join(kinds)}, got one of {allocation.kind}")
    if len(allocation.values) != len(stack):
        raise ValueError(f"plan: expected {len(stack)} values, one a layer, got {len(allocation.values)}")
    check_sizes("plan", allocation.model, allocation.sizes, stack)
    ranks: dict[str, int] = {}
    nonzeros: dict[str, int] = {}
    made_for = (name_of(stack), sizes_of(stack), basis)
    if allocation.granularity != "layer":
        ranks = _ranks_of_matrices(stack, allocation, factor_share, basis)
        return RankPlan(allocation.kind, allocation.budget, ranks, allocation.method, nonzeros, *made_for)
    for index, share in enumerate(allocation.values):
        if not 0 <= share <= 1 or math.isnan(share):
            raise ValueError(f"plan: expected shares in 0..1, got {share} in layer {index}")
        rank_of = rank_of_share
        if allocation.kind == "parameter_share":
            share, rank_of = _share_of_matrices(stack, index, share, basis), rank_of_weights
        if factor_share is not None:
            sizes = {
                n: sizes_of_weights(shape, share, factor_share)
                for n, shape in factorizable(stack, index, basis).items()
            }
            ranks |= {name: size[0] for name, size in sizes.items() if size is not None}
            nonzeros |= {name: size[1] for name, size in sizes.items() if size is not None}
            continue
        found = {name: rank_of(shape, share) for name, shape in factorizable(stack, index, basis).items()}
        ranks |= {name: rank for name, rank in found.items() if rank is not None}
    return RankPlan(allocation.kind, allocation.budget, ranks, allocation.method, nonzeros, *made_for)


def _ranks_of_matrices(
    stack: DecoderLayers, allocation: LayerAllocation, factor_share: float | None, basis: str
) -> dict[str, int]:
    """The rank of each matrix by its own share.

    Raises:
        ValueError: a sparse part is wanted; a matrix that cannot be factorized, so that the budget would not be met;
            shares of experts that are in a bank, whose factors have one rank.
    """
    if factor_share is not None:
        raise ValueError(f"plan: expected granularity layer with a sparse part, got {allocation.granularity}")
    shares = allocation.modules
    if allocation.experts:
        shares = _shares_of_listed(stack, allocation, basis)
    check_names_of_matrices(shares, stack)
    rank_of = rank_of_share if allocation.kind == "rank" else rank_of_weights
    ranks: dict[str, int] = {}
    for index in range(len(stack)):
        shapes = factorizable(stack, index, basis)
        for name in stack.input_shapes(index):
            share = shares.get(name, 1.0)
            if name not in shapes and share < 1:
                raise ValueError(
                    f"plan: expected granularity layer for a model with matrices that are not factorized, got "
                    f"{allocation.granularity}, with {name}{experts_told(stack)}"
                )
            rank = rank_of(shapes[name], share) if name in shapes else None
            ranks |= {} if rank is None else {name: rank}
    return ranks


def _shares_of_listed(stack: DecoderLayers, allocation: LayerAllocation, basis: str) -> dict[str, float]:
    """The share of each matrix in a plan by expert, if each expert is a module of its own. The matrices of an expert,
    and the other weights of a layer, keep their share together, with those that are not factorized.

    Raises:
        ValueError: experts in a bank; a share that is too small, because of matrices that are not factorized.
    """
    values = values_of_parts(allocation.experts, allocation.common, stack)
    banked = next((name for name, expert in values if expert is not None), None)
    if banked is not None:
        raise ValueError(
            "plan: expected granularity layer, block or module for experts in one parameter, whose factors have one "
            f"rank, got expert for {banked}"
        )
    found: dict[str, float] = {}
    for index in range(len(stack)):
        sets = [own for own in stack.expert_sets(index) if not own.shared]
        parts = [[name for name, _ in own.matrices_of(expert)] for own in sets for expert in range(own.count)]
        experts = {name for part in parts for name in part}
        parts.append([name for name in stack.input_shapes(index) if name not in experts])
        shapes = factorizable(stack, index, basis)
        sizes = {name: math.prod(shape_of(module)) for name, module in stack.linears(index).items()}
        for part in parts:
            flexible, total = (sum(sizes[n] for n in part if n in sizes and (n in shapes or k)) for k in (False, True))
            share = values[part[0], None] if part else 1.0
            if allocation.kind == "parameter_share":
                share = 1 - (1 - share) * total / flexible if flexible else 1.0
            if share < 0:
                least, got = 1 - flexible / total, values[part[0], None]
                raise ValueError(
                    f"plan: expected a share above {least:.4g} for {part[0]}, beside matrices that are not factorized, "
                    f"got {got:.4g}"
                )
            found |= {name: share if name in shapes else 1.0 for name in part}
    return found


def _share_of_matrices(stack: DecoderLayers, index: int, share: float, basis: str) -> float:
    """The share that the factorizable matrices keep, so that the layer with all other matrices keeps `share`."""
    total, least = stack.count_weights(index), least_weights(stack, index, basis)
    # Shares that are computed from a sum have rounding errors.
    if share * total < least - 1e-6 * total:
        raise ValueError(
            f"parameter_share: expected at least {math.ceil(1e4 * least / total) / 1e4:g} in layer {index} (rank 1 "
            f"wherever that is smaller{experts_told(stack)}), got {share:.4g}"
        )
    flexible = sum(count(shape, None) for shape in factorizable(stack, index, basis).values())
    return 1.0 if not flexible else 1 - (1 - share) * total / flexible


def check_ranks(stack: DecoderLayers, plan: RankPlan) -> None:
    """Checks that the ranks and the sizes of sparse parts are valid for the model, and smaller than its matrices.

    Raises:
        ValueError: a plan for another model; names the missing matrix, or the valid range of the rank or of nonzeros.
    """
    check_sizes("plan", plan.model, plan.sizes, stack)
    shapes = {
        name: shape
        for index in range(len(stack))
        for name, shape in factorizable(stack, index, plan.expert_basis).items()
    }
    for name, rank in plan.ranks.items():
        if name not in shapes:
            raise ValueError(f"ranks: expected matrices of {type(stack.model).__name__}, got {name!r}")
        shape = shapes[name]
        told = " x ".join(map(str, shape))
        if type(rank) is not int or not 1 <= rank <= most_rank(shape):
            raise ValueError(
                f"ranks: expected 1..{most_rank(shape)} for {name}, at which factors have fewer weights than its "
                f"{told}, got {rank}"
            )
        most, kept = count(shape, None) - count(shape, rank) - 1, plan.nonzeros.get(name, 0)
        if type(kept) is not int or not 0 <= kept <= most:
            raise ValueError(
                f"nonzeros: expected 0..{most} for {name}, which with rank {rank} are fewer weights than its "
                f"{told}, got {kept}"
            )
    unknown = next((name for name in plan.nonzeros if name not in plan.ranks), None)
    if unknown is not None:
        raise ValueError(f"nonzeros: expected matrices that have a rank, got {unknown!r}")
    if not plan.ranks:
        raise ValueError("plan: expected ranks at which factors have fewer weights than a matrix, got none; keep less")
