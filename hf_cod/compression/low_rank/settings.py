"""Settings of `factorize` and `plan_ranks`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.module_names import ModuleFields, ModuleSettings, Names, check_names
from hf_cod.io.settings import SampleFields, as_in, check_choice

# Method -> the error that it minimizes; `factorize` has the formulas.
METHODS = {
    "whitened": "error of the outputs on the calibration dataset",
    "plain": "error of the entries (requires no dataset)",
    "oats": "low rank plus a sparse matrix, columns weighted by their inputs in the calibration dataset",
}
# Weighing -> the quantity that `plan_ranks` sums over matrices.
WEIGHINGS = {
    "fisher": "lost share of each output, times its cost in the model's loss",
    "spectrum": "lost share of each output",
}
# Basis of the experts of a bank -> what they have in common.
EXPERT_BASES = {
    "own": "nothing: factors of each expert's own",
    "shared": "the factor on the side of the hidden state: one for all experts of a bank",
}
OWN, SHARED = EXPERT_BASES
FACTOR_SHARE = 0.25  # kappa of arXiv 2409.13652


@renamed(rank_share="factor_share")
@checked
@dataclass
class FactorizeSettings:
    """How matrices are factorized."""

    method: str = field(
        default="whitened",
        metadata={
            "help": "factorization: whitened (least error of the outputs on the calibration dataset), plain (least "
            "error of the entries), or oats (low rank plus a sparse matrix)",
            "choices": list(METHODS),
        },
    )
    factor_share: float = field(
        default=FACTOR_SHARE,
        metadata={
            "help": "oats: share of the kept weights that are in the low-rank factors, 0 to 1; the others are in the "
            "sparse matrix"
        },
    )
    expert_basis: str = field(
        default=OWN,
        metadata={
            "help": "banks of experts: own (each expert has two factors of its own) or shared (the factor on the side "
            "of the hidden state is the same for all experts of a bank, which leaves a higher rank within the budget)",
            "choices": list(EXPERT_BASES),
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field
    rank_share = OldAttribute("factor_share")

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not 0 < self.factor_share < 1:
            raise ValueError(f"factor_share: expected a share between 0 and 1, got {self.factor_share}")
        check_choice("expert_basis", self.expert_basis, EXPERT_BASES)
        if self.method == "oats" and self.expert_basis != OWN:
            raise ValueError(f"expert_basis: expected {OWN} with oats, which keeps banks, got {self.expert_basis}")
        check_names(self)


class FactorizeFields(ModuleFields, SampleFields, total=False):
    """Fields of `FactorizeSettings`, and of samples, that `factorize` takes by name."""

    factor_share: float
    expert_basis: str


@checked
@dataclass
class RankSettings:
    """How ranks are distributed over matrices."""

    method: str | None = field(
        default=None,
        metadata={
            "help": f"loss that is summed over matrices: {', '.join(WEIGHINGS)}; default: fisher with batches of a "
            "language model, else spectrum",
            "choices": list(WEIGHINGS),
        },
    )
    expert_basis: str = as_in(FactorizeSettings, "expert_basis")
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("method", self.method, WEIGHINGS)
        check_choice("expert_basis", self.expert_basis, EXPERT_BASES)
        check_names(self)


class RankFields(ModuleFields, SampleFields, total=False):
    """Fields of `RankSettings`, and of samples, that `plan_ranks` takes by name."""

    expert_basis: str
