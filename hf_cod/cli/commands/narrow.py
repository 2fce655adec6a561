"""hf-cod narrow MODEL: remove attention heads and MLP channels, more in less important layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, SpeedSettings, SpreadSettings
from hf_cod.cli.step import Step, uniform_baseline
from hf_cod.compression.width.settings import NarrowSettings
from hf_cod.io.module_names import ModuleSettings, Names, check_names
from hf_cod.io.settings import DefaultName, ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.layers.units import LayerUnits
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores

# The cheapest score that was never worse than a uniform plan in our measurements: owl was worse at 40 % fewer
# parameters, angular at 60 %.
DEFAULT_SCORE = "auto"
WITHOUT_LOSS = "angular"  # up to 40 %, the best of the scores that require no loss


@dataclass
class NarrowOptions(SpeedSettings, SpreadSettings):
    """Settings of narrowing, and of samples."""

    method: str = as_in(NarrowSettings, "method")
    compensation: str = as_in(NarrowSettings, "compensation")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score of layers; layers with a higher score lose fewer weights: {', '.join(SCORES)}; default: "
            f"{DEFAULT_SCORE}; {WITHOUT_LOSS} for a model whose loss cannot be measured; owl with --threshold or "
            "--per-module"
        },
    )
    parameter_share: float = field(default=0.8, metadata={"help": "share of the layers' weights to keep"})
    channel_multiple: int = as_in(NarrowSettings, "channel_multiple")
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        super().__post_init__()
        NarrowSettings(self.method, self.compensation, self.channel_multiple)
        check_names(self)
        if self.score is None and self.implied_score is not None:
            self.score = DefaultName(self.implied_score)
        if self.score is not None:
            check_choice("score", self.score, SCORES)
        if not 0 < self.parameter_share <= 1:
            raise ValueError(f"parameter_share: expected a share above 0 and at most 1, got {self.parameter_share}")
        if self.spread is not None:
            self.check_spread()

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """For each layer, the share of weights to keep."""
        from hf_cod.scoring.allocation import allocate

        return allocate(scores, "parameter_share", self.parameter_share, self.spread)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, NarrowOptions, CompressionOutput],
        prog="hf-cod narrow",
        description="Removes attention heads and MLP channels, more in less important layers, and writes a smaller, "
        "dense model. The result is a stock checkpoint if all layers have equal widths that the config of the family "
        "supports; otherwise from_pretrained loads it if hf_cod is imported, or with trust_remote_code. After an "
        "interruption the same command resumes. The input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    settings.check_scored(files.scores)
    from hf_cod.cli.compression import compress

    return compress(Narrow(settings), rest.model, loading, text, files)


@dataclass(frozen=True)
class Reached:
    """A plan that the layers can keep.

    Attributes:
        allocation: the share of weights that each layer keeps.
        notes: on layers that keep more than by the score.
    """

    allocation: LayerAllocation
    notes: list[str]

    @property
    def method(self) -> str:
        """The score of the plan."""
        return self.allocation.method


class Narrow(Step):
    """Fewer heads and channels, by a plan of shares of layers."""

    command, done = "narrow", "narrowed"
    _units: Sequence[LayerUnits]  # of the intact model, however often it is loaded again

    def check(self, work: Work) -> None:
        """Checks that matrices can be replaced by others, the result can be saved, layers run alone, and can keep the
        share.
        """
        from hf_cod.compression.width.planning import within_reach
        from hf_cod.layers.checks import check_reshapeable
        from hf_cod.layers.independence import check_independent
        from hf_cod.layers.unit_discovery import find_all_units

        check_reshapeable(work.stack, "narrow")
        check_independent(work.stack, "narrow")
        self._units = find_all_units(work.stack)
        within_reach(work.stack, self._units, self.settings.parameter_share, self.settings)

    def plan(self, work: Work) -> Reached:
        """For each layer, the share of weights to keep."""
        share = self.settings.parameter_share
        # sensitivity and auto evaluate sparsity plans: the closest approximation of narrowing.
        tried = {"target": 1 - share} if share < 1 else {}
        scores = work.score(self.settings.score or _default_score(work), **tried)
        return self._within_reach(work, self.settings.allocate(scores))

    def baselines(self, work: Work, plan: Reached) -> dict[str, Any]:
        """The same share for all layers that can keep as little."""
        alike = uniform_baseline(plan, self.settings, work.scores)
        return {name: self._within_reach(work, other) for name, other in alike.items()}

    def _within_reach(self, work: Work, plan: LayerAllocation) -> Reached:
        """The plan that the layers can keep.

        Raises:
            ValueError: it would differ, and the user set the spread.
        """
        from hf_cod.compression.width.planning import within_reach

        reached = Reached(*within_reach(work.stack, self._units, plan, self.settings))
        if self.settings.spread is not None and reached.notes:
            shares = zip(plan.values, reached.allocation.values, strict=True)
            layer, (share, least) = max(enumerate(shares), key=lambda each: each[1][1] - each[1][0])
            raise ValueError(
                f"spread: expected a smaller one, or none, got {self.settings.spread:g}: layer {layer} has to keep "
                f"{least:.4g} of its weights, and by this spread it keeps {share:.4g}"
            )
        return reached

    def apply(self, work: Work, plan: Reached) -> RunReport:
        """Narrows the layers."""
        from hf_cod.compression.width.narrower import narrow_units

        chosen = {field.name: getattr(self.settings, field.name) for field in fields(NarrowSettings)}
        how, name = NarrowSettings(**chosen), work.name
        report = narrow_units(
            work.model, self._units, plan.allocation, how, work.calibration, name=name, **work.options
        )
        return replace(report, notes=[*report.notes, *plan.notes])

    def files(self, plan: Reached) -> dict[str, Any]:
        """The allocation."""
        return {"allocation.json": plan.allocation}

    def told(self, plan: Reached) -> dict[str, Any]:
        """The score of the plan, which may be a default."""
        return {"score": plan.method}


def _default_score(work: Work) -> str:
    """The default score; auto evaluates plans, which requires a language model with floating-point weights."""
    from hf_cod.layers.task import LANGUAGE_MODELS, task_of

    measured = task_of(work.model) in LANGUAGE_MODELS and not getattr(work.model, "is_quantized", False)
    return DEFAULT_SCORE if measured else WITHOUT_LOSS
