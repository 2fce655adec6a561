"""What `factorize` and `plan_ranks` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import check_choice

# Method -> what the product of two thin matrices is nearest to; `factorize` has the formulas.
METHODS = {
    "whitened": "outputs change least on the text",
    "plain": "entries change least; needs no text",
    "oats": "a sparse matrix beside the factors, outputs weighted by the text",
}
# What `plan_ranks` weighs losses of different matrices by.
WEIGHINGS = {
    "fisher": "what the loss of a matrix costs the model",
    "spectrum": "how much of its output it loses",
}
RANK_SHARE = 0.25  # kappa of arXiv 2409.13652


@checked
@dataclass
class FactorizeSettings:
    """How matrices become products."""

    method: str = field(
        default="whitened",
        metadata={
            "help": "whitened: outputs change least on the text; plain: entries change least; oats: a sparse matrix "
            "beside the factors",
            "choices": list(METHODS),
        },
    )
    rank_share: float = field(
        default=RANK_SHARE, metadata={"help": "of the weights that oats keeps, the part in thin factors, 0 to 1"}
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not 0 < self.rank_share < 1:
            raise ValueError(f"rank_share: expected a share between 0 and 1, got {self.rank_share}")


class FactorizeFields(TypedDict, total=False):
    """Fields of `FactorizeSettings` that `factorize` takes by name."""

    rank_share: float


@checked
@dataclass
class RankSettings:
    """What decides which matrix gets which rank."""

    method: str | None = field(
        default=None,
        metadata={
            "help": f"what is summed up over matrices: {', '.join(WEIGHINGS)}; default: fisher with text of a language "
            "model, else spectrum",
            "choices": list(WEIGHINGS),
        },
    )

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("method", self.method, WEIGHINGS)


class RankFields(TypedDict, total=False):
    """Fields of `RankSettings` that `plan_ranks` takes by name; there are no others yet."""
