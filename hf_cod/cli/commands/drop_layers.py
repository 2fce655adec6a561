"""hf-cod drop-layers MODEL: remove the least important layers of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import LimitedModelSettings, MeasuringSettings, ResultsOutput, SpeedSettings
from hf_cod.cli.step import Step
from hf_cod.compression.depth.settings import DepthSettings
from hf_cod.io.settings import TextSettings, as_in

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.compression.depth.depth_plan import DepthPlan
    from hf_cod.io.report import RunReport

DEFAULT_SHARE = 0.8


@dataclass
class DropLayersOptions(SpeedSettings, MeasuringSettings):
    """Settings of the choice of layers, and of the samples for it."""

    n_removed: int | None = field(
        default=None, metadata={"help": "number of layers to remove; default: as many as --parameter-share requires"}
    )
    parameter_share: float | None = field(
        default=None,
        metadata={"help": f"number of layers to keep, as a share of all layers, 0 to 1; default: {DEFAULT_SHARE}"},
    )
    criterion: str = as_in(DepthSettings, "criterion")
    replacement: str = as_in(DepthSettings, "replacement", default="measured")
    protect: bool = as_in(DepthSettings, "protect")
    explain: bool = field(default=False, metadata={"help": "print the cost of each layer, and the removed layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        DepthSettings(criterion=self.criterion, replacement=self.replacement)
        if self.n_removed is not None and self.parameter_share is not None:
            raise ValueError("n_removed: expected either n_removed or parameter_share, got both")
        if self.n_removed is not None and self.n_removed < 1:
            raise ValueError(f"n_removed: expected at least 1 layer to remove, got {self.n_removed}")
        if self.parameter_share is not None and not 0 < self.parameter_share < 1:
            raise ValueError(f"parameter_share: expected a share between 0 and 1, got {self.parameter_share}")

    def check_beside_plan(self) -> None:
        """Checks that no option is set that the plan already determines.

        Raises:
            ValueError: the number of layers, the criterion, or the protection is set.
        """
        decided = ("n_removed", "parameter_share", "criterion", "protect")
        given = [f.name for f in fields(self) if f.name in decided and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"plan: expected no {given[0]}, which is part of the plan, got both")

    def count(self, depth: int) -> int:
        """Number of layers to remove out of `depth`: the smallest that leaves at most the share of parameters."""
        if self.n_removed is not None:
            return self.n_removed
        share = DEFAULT_SHARE if self.parameter_share is None else self.parameter_share
        removed = math.ceil((1 - share) * depth - 1e-9)
        if removed >= depth:
            raise ValueError(
                f"parameter_share: expected at least {1 / depth:.3g}, which leaves one of {depth} layers, got {share}"
            )
        return removed


@dataclass
class DropLayersOutput(ResultsOutput):
    """Settings of the output directory, and a plan file as input."""

    plan: str | None = field(
        default=None, metadata={"help": "depth_plan.json of an earlier run; default: layers are chosen by this command"}
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [LimitedModelSettings, TextSettings, DropLayersOptions, DropLayersOutput],
        prog="hf-cod drop-layers",
        description="Removes the least important layers of a model. A stock model remains a stock checkpoint, which "
        "loads without hf_cod. After an interruption the same command resumes. The input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    if files.plan is not None:
        from hf_cod.compression.depth.depth_plan import DepthPlan

        settings.check_beside_plan()
        try:
            DepthPlan.load(files.plan)  # checked before the model is loaded
        except ValueError as error:
            raise ValueError(f"plan{str(error).removeprefix(DepthPlan.FIELD)}") from error  # the option's name
    from hf_cod.cli.compression import compress

    return compress(DropLayers(settings, files.plan), rest.model, loading, text, files)


class DropLayers(Step):
    """Removes layers by a plan that is computed or read from a file."""

    command, done = "drop-layers", "dropped"
    earlier: ClassVar[dict[str, str]] = {"n_removed": "layers"}

    def __init__(self, settings: DropLayersOptions, plan_file: str | None) -> None:
        super().__init__(settings)
        self.plan_file = plan_file

    def identity(self) -> Any:
        """The settings and the plan file."""
        return [super().identity(), self.plan_file]

    def in_memory(self) -> str | None:
        """Linear maps become part of matrices that are in memory."""
        return None if self.settings.replacement == "none" else f"replacement {self.settings.replacement}"

    def check(self, work: Work) -> None:
        """Checks that layers can be measured one by one, to choose from them; a plan file has chosen."""
        from hf_cod.layers.independence import NAMED, check_independent

        if self.plan_file is None:
            check_independent(work.stack, "layers", way_out=NAMED)

    def plan(self, work: Work) -> DepthPlan:
        """The layers to remove."""
        from hf_cod.compression.depth.criteria import plan_depth
        from hf_cod.compression.depth.depth_plan import DepthPlan

        if self.plan_file is not None:
            plan = DepthPlan.load(self.plan_file)
        else:
            count, chosen = self.settings.count(len(work.stack)), self.settings
            how: dict[str, Any] = {"protect": chosen.protect, "replacement": chosen.replacement, **work.options}
            plan = plan_depth(work.model, count, chosen.criterion, batches=work.calibration, **how)
        if self.settings.explain:
            from hf_cod.cli.explained import explain_depth

            explain_depth(plan)
        return plan

    def apply(self, work: Work, plan: DepthPlan) -> RunReport:
        """Removes the layers."""
        from hf_cod.compression.depth.dropper import drop_layers

        path, replacement = self.settings.layers_path, self.settings.replacement
        return drop_layers(work.model, plan, replacement, batches=work.calibration, layers_path=path, name=work.name)

    def files(self, plan: DepthPlan) -> dict[str, Any]:
        """The plan."""
        return {"depth_plan.json": plan}

    def told(self, plan: DepthPlan) -> dict[str, Any]:
        """The criterion and the plan file."""
        return {"criterion": plan.criterion, "plan": self.plan_file}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """The summary; for models of hf_cod also how to load them, which does not change."""
        if not saved.config.model_type.startswith("cod_"):
            return report.summary
        before = "As before, it loads if hf_cod is imported, and otherwise with trust_remote_code."
        return [*report.summary, before]
