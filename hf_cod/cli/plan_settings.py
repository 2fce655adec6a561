"""Settings of plans inside the layer, and of the search for a plan, that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_cod.cli.settings import CompressionSettings
from hf_cod.compression.search.settings import SearchSettings
from hf_cod.io.settings import DefaultName, as_in, check_choice, check_effect, check_least
from hf_cod.scoring.settings import (
    EXPERT,
    EXPERT_METHODS,
    GRANULARITIES,
    PLAN_GRANULARITIES,
    AllocationSettings,
    ExpertScoreSettings,
)


@dataclass
class PlanSearchSettings:
    """Settings of the search for a plan."""

    search: bool = field(
        default=False,
        metadata={
            "help": "search for the plan: start from the best of the plans by several scores, or of those by --scores "
            "and the uniform one, and improve it by the KL divergence between the intact and the compressed model, on "
            "the second half of the calibration samples (EvoPress, arXiv 2410.14649). The cost is printed first"
        },
    )
    search_passes: int = as_in(SearchSettings, "passes")

    def check_search(self, without: Sequence[str]) -> None:
        """Checks that settings of a plan by one score are not given with a search, nor settings of a search without.

        Args:
            without: the fields that a search does not use.
        """
        check_least(self, search_passes=1)
        if self.search and getattr(self, "granularity", "") == EXPERT:
            raise ValueError(f"granularity: expected {', '.join(GRANULARITIES)} with search, got {EXPERT}")
        if not self.search:
            check_effect(self, ["search_passes"], "a plan without --search")
            return
        check_effect(self, without, "search, which does not use it")


@dataclass
class PartSettings:
    """Settings of plans inside the layer."""

    granularity: str = as_in(AllocationSettings, "granularity", default="layer")
    experts: str | None = field(
        default=None,
        metadata={
            "help": "granularity expert: score of single experts, which are compared over all layers: "
            + ", ".join(EXPERT_METHODS)
            + f"; default: {ExpertScoreSettings().method}. The score of layers serves all other matrices",
            "choices": list(EXPERT_METHODS),
        },
    )

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, PLAN_GRANULARITIES)
        if self.experts is not None:
            check_choice("experts", self.experts, EXPERT_METHODS)
        if self.granularity != EXPERT:
            check_effect(self, ["experts"], f"granularity {self.granularity}; set --granularity {EXPERT}")
        elif self.experts is None:
            self.experts = DefaultName(ExpertScoreSettings().method)


def check_parts(settings: CompressionSettings) -> None:
    """Checks that all matrices are chosen if parts of layers have values of their own, whose mean is over all of them.

    Raises:
        ValueError: `include` or `exclude` is given.
    """
    granularity = getattr(settings, "granularity", "layer")
    named = next((name for name in ("include", "exclude") if getattr(settings, name, None)), None)
    if granularity != "layer" and named is not None:
        raise ValueError(f"granularity: expected layer with {named}, got {granularity}")
