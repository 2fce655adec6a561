"""hf-cod drop-experts MODEL: remove the least important experts of a mixture, or merge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import MeasuringSettings, ResultsOutput, SpeedSettings
from hf_cod.cli.step import Step
from hf_cod.compression.experts.settings import DEFAULT_SHARE, DropExpertsSettings
from hf_cod.io.settings import DefaultNumber, ModelSettings, TextSettings, as_in, check_effect

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.compression.experts.expert_plan import ExpertPlan
    from hf_cod.io.report import RunReport


@dataclass
class DropExpertsOptions(SpeedSettings, MeasuringSettings):
    """Settings of the choice of experts, and of the samples for it."""

    share: float = field(
        default=DefaultNumber(DEFAULT_SHARE),
        metadata={
            "help": "share of the experts to remove, the same number in each layer; rounded to the nearest number that "
            "the groups of the router allow"
        },
    )
    method: str = as_in(DropExpertsSettings, "method")
    threshold: float = as_in(DropExpertsSettings, "threshold", default=DefaultNumber(DropExpertsSettings().threshold))
    merge: bool = as_in(DropExpertsSettings, "merge")

    def __post_init__(self) -> None:
        super().__post_init__()
        DropExpertsSettings(self.method, self.threshold, self.merge)
        if self.method != "owl":
            check_effect(self, ["threshold"], f"method {self.method}, which does not use it")
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected a share between 0 and 1, got {self.share}")


@dataclass
class DropExpertsOutput(ResultsOutput):
    """Settings of the output directory, and a plan file as input."""

    plan: str | None = field(
        default=None,
        metadata={"help": "expert_plan.json of an earlier run; default: experts are chosen by this command"},
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, DropExpertsOptions, DropExpertsOutput],
        prog="hf-cod drop-experts",
        description="Removes the least important experts of a mixture of experts with their rows of the router, or "
        "merges them into others. The result is a stock checkpoint, which loads without hf_cod. The input model is "
        "never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    if files.plan is not None:
        from hf_cod.compression.experts.expert_plan import ExpertPlan

        check_effect(settings, ["share", "method", "threshold"], "a plan, which has the experts to remove")
        try:
            ExpertPlan.load(files.plan)  # checked before the model is loaded
        except ValueError as error:
            raise ValueError(f"plan{str(error).removeprefix(ExpertPlan.FIELD)}") from error  # the option's name
    from hf_cod.cli.compression import compress

    return compress(DropExperts(settings, files.plan), rest.model, loading, text, files)


class DropExperts(Step):
    """Removes experts by a plan that is computed or read from a file."""

    command, done = "drop-experts", "dropped"

    def __init__(self, settings: DropExpertsOptions, plan_file: str | None) -> None:
        super().__init__(settings)
        self.plan_file = plan_file

    def identity(self) -> Any:
        """The settings and the plan file."""
        return [super().identity(), self.plan_file]

    def check(self, work: Work) -> None:
        """Checks that the model is a mixture, the weights of which can be replaced."""
        from hf_cod.layers.removal.experts import check_removable, mixtures_of

        mixtures_of(work.stack)
        check_removable(work.stack)

    def plan(self, work: Work) -> ExpertPlan:
        """The experts to remove."""
        from hf_cod.compression.experts.expert_plan import ExpertPlan
        from hf_cod.compression.experts.planning import plan_experts

        if self.plan_file is not None:
            return ExpertPlan.load(self.plan_file)
        how, path = self.settings, self.settings.layers_path
        more: dict[str, Any] = {"threshold": how.threshold, "layers_path": path, "show_progress": True}
        return plan_experts(work.model, how.share, method=how.method, batches=work.calibration, **more)

    def apply(self, work: Work, plan: ExpertPlan) -> RunReport:
        """Removes the experts."""
        from hf_cod.compression.experts.dropper import drop_experts

        more: dict[str, Any] = {"layers_path": self.settings.layers_path, "name": work.name, "show_progress": True}
        return drop_experts(work.model, plan, batches=work.calibration, merge=self.settings.merge, **more)

    def files(self, plan: ExpertPlan) -> dict[str, Any]:
        """The plan."""
        return {"expert_plan.json": plan}

    def told(self, plan: ExpertPlan) -> dict[str, Any]:
        """The method, and the plan file."""
        share = plan.n_removed / plan.count
        return {
            "method": plan.method,
            "plan": self.plan_file,
            "share": share if self.plan_file else self.settings.share,
        }
