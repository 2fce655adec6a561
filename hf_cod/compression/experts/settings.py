"""Settings of `plan_experts` and `drop_experts`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, as_in, check_choice
from hf_cod.scoring.settings import EXPERT_METHODS, ExpertScoreSettings, check_threshold

DEFAULT_SHARE = 0.25


@checked
@dataclass
class PlanExpertsSettings:
    """How experts are selected."""

    method: str = field(
        default="reap",
        metadata={
            "help": "score of experts, of which the lowest are removed. "
            + "; ".join(f"{name}: {method.description}" for name, method in EXPERT_METHODS.items()),
            "choices": list(EXPERT_METHODS),
        },
    )
    threshold: float = as_in(ExpertScoreSettings, "threshold")

    def __post_init__(self) -> None:
        check_choice("method", self.method, EXPERT_METHODS)
        check_threshold(self.threshold)


class PlanExpertsFields(SampleFields, total=False):
    """Fields of `PlanExpertsSettings`, and of samples, that `plan_experts` takes by name."""

    threshold: float


@checked
@dataclass
class DropExpertsSettings(PlanExpertsSettings):
    """How experts are selected, and what becomes of the removed ones."""

    merge: bool = field(
        default=False,
        metadata={
            "help": "merge each removed expert into the most similar kept one of its layer, weighted by the numbers of "
            "tokens that were routed to both; default: removed experts are lost"
        },
    )


class DropExpertsFields(PlanExpertsFields, total=False):
    """Fields of `DropExpertsSettings`, and of samples, that `drop_experts` takes by name."""

    method: str
    merge: bool
