"""hf-cod fit MODEL --memory 4GB | --parameter-share 0.6 | --bits 3.2: the best combination of methods in a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import MeasuringSettings, ResultsOutput, SpeedSettings
from hf_cod.cli.sizes import parse_bytes
from hf_cod.cli.step import Step
from hf_cod.compression.fit.settings import FitSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in

if TYPE_CHECKING:
    from rich.console import Console

    from hf_cod.cli.work import Work
    from hf_cod.compression.fit.budget import Budget
    from hf_cod.compression.fit.fit_plan import FitPlan
    from hf_cod.io.report import RunReport
    from hf_cod.layers.size import ModelSize


UNKNOWN = "-"
INTERPOLATED = (
    "not measured. The expected loss assumes that the losses of the single methods add up, and is interpolated between "
    "their measured levels. The size is expected as well."
)


@dataclass
class FitOptions(SpeedSettings, MeasuringSettings):
    """Settings of the budget, and of the search."""

    memory: str | None = field(
        default=None, metadata={"help": "budget: size of the full model in memory, such as 4GB or 600MiB; no default"}
    )
    parameter_share: float | None = field(
        default=None,
        metadata={
            "help": "budget: share of the weights in the layers' matrices to keep, 0 to 1, in a dense model; no default"
        },
    )
    bits: float | None = field(
        default=None, metadata={"help": "budget: stored bits per original weight of the layers' matrices; no default"}
    )
    knobs: list[str] = as_in(FitSettings, "knobs", default_factory=list)  # noqa: RUF009 - as_in makes a field
    tuning_samples: int = as_in(FitSettings, "tuning_samples")
    n_verified: int = as_in(FitSettings, "n_verified")
    plan_only: bool = field(default=False, metadata={"help": "print the plan and the trade-off, and write no model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("memory", "parameter_share", "bits") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget: expected one of --memory, --parameter-share and --bits, got {' and '.join(given) or 'none'}"
            )
        FitSettings(knobs=self.knobs or None, n_verified=self.n_verified, tuning_samples=self.tuning_samples)
        self.check_budget()
        self.speed = self.speed and not self.plan_only

    def budget(self) -> tuple[str, float]:
        """Kind and value of the budget."""
        if self.memory is not None:
            return "memory", parse_bytes(self.memory, "memory")
        if self.parameter_share is not None:
            return "parameter_share", self.parameter_share
        assert self.bits is not None
        return "bits", self.bits

    def check_budget(self) -> None:
        """Checks the range of the budget.

        Raises:
            ValueError: it is out of range.
        """
        from hf_cod.compression.fit.budget import check_budget

        check_budget(*self.budget())


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FitOptions, ResultsOutput],
        prog="hf-cod fit",
        description="Compresses a model to a budget with the lowest loss: measures the cost of each single method, "
        "prints the best combination and the trade-off, applies the combination, and writes a model that "
        "from_pretrained loads if hf_cod is imported. After an interruption the same command resumes. The input model "
        "is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    from hf_cod.cli.compression import compress

    return compress(Fit(settings), rest.model, loading, text, files)


class Fit(Step):
    """Several methods in sequence, by a measured plan."""

    command, done = "fit", "fitted"
    earlier: ClassVar[dict[str, str]] = {"n_verified": "verify"}
    before: ModelSize
    fitted: ModelSize

    def samples(self) -> FitOptions:
        """The tuning samples are added to the calibration samples, from which they are split later."""
        return replace(self.settings, max_samples=self.settings.max_samples + self.settings.tuning_samples)

    def check(self, work: Work) -> None:
        """Checks that the model is a language model."""
        from hf_cod.layers.task import LANGUAGE_MODELS, task_of

        if task_of(work.model) not in LANGUAGE_MODELS:
            kind = type(work.model).__name__
            raise ValueError(f"model: expected a language model, whose loss can be measured, got {kind}")

    def plan(self, work: Work) -> FitPlan | None:
        """Measures the methods on models that are loaded for this, chooses a combination, prints the plan."""
        from hf_cod.compression.fit.planning import plan_fit
        from hf_cod.layers.devices import environment_of
        from hf_cod.layers.size import size_of

        work.calibration, tuning = _split(work.calibration, self.settings)
        self.before = size_of(work.model, self.settings.layers_path)
        self.environment = environment_of(work.model)
        work.model = None
        chosen: dict[str, Any] = {
            "knobs": self.settings.knobs or None,
            "n_verified": self.settings.n_verified,
            **work.options,
        }
        kind, budget = self.settings.budget()
        plan = plan_fit(work.load, kind, budget, work.calibration, tuning, **chosen)
        print_plan(plan, alone=self.settings.plan_only)
        if self.settings.plan_only:
            return None
        work.renew()
        return plan

    def apply(self, work: Work, plan: FitPlan) -> RunReport:
        """Applies the steps of the plan."""
        from hf_cod.compression.fit.knobs import Applying
        from hf_cod.compression.fit.trials import apply_steps
        from hf_cod.io.report import RunReport

        apply_steps(work.model, plan.steps, Applying(work.calibration, **work.options))
        results = {"plan": asdict(plan)}
        return RunReport("fit", work.name, {}, self.environment, {}, results, [_told_plan(plan)], plan.notes)

    @property
    def _budget(self) -> Budget:
        from hf_cod.compression.fit.budget import Budget

        kind, value = self.settings.budget()
        return Budget(kind, value, self.before)

    def files(self, plan: FitPlan) -> dict[str, Any]:
        """The plan."""
        return {"fit_plan.json": plan}

    def measure(self, saved: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Size of the layers in bytes, and number of weights in their matrices.

        Raises:
            ValueError: the saved model exceeds the budget.
        """
        from hf_cod.layers.size import size_of, size_results

        after = size_of(saved.model, self.settings.layers_path)
        self._budget.check_met_by(after)
        self.fitted = after
        return {}, size_results({"intact": self.before, "fitted": after})

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """The plan, the budget, the weights that are left, and for a plan that stores them in fewer bits, how many."""
        from hf_cod.io.report import format_number

        budget = self._budget
        most, used = budget.told(budget.value), budget.told(budget.used(self.fitted))
        met = f"The budget is met: {budget.kind} {used}, at most {most}."
        weights = report.results["layer_weights"]
        left = f"{weights['fitted'] / weights['intact']:.1%} of the weights of the layers' matrices are left."
        if not {"bits", "sparsity"} & report.results["plan"]["steps"].keys():
            return [*report.summary, met, left]
        bits = 8 * report.results["layer_bytes"]["fitted"] / weights["intact"]
        stored = f"The layers take {format_number(bits)} bits per original weight of their matrices."
        return [*report.summary, met, left, stored]


def print_plan(plan: FitPlan, alone: bool) -> None:
    """Prints the measured combinations and the trade-off; if no report follows, also the chosen plan and the notes."""
    from hf_cod.cli.terminal import make_console
    from hf_cod.io.display import terminal_text

    console = make_console()
    if plan.steps:
        _print_tables(plan, console)
    for line in (_told_plan(plan), *plan.notes) if alone else ():
        console.print(f"• {terminal_text(line)}", highlight=False)


def _print_tables(plan: FitPlan, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from hf_cod.compression.fit.knobs import describe_steps

    tried = Table("tried", "layers' size", "loss expected", "measured", box=box.SIMPLE_HEAD)
    for row in sorted(plan.tried, key=lambda row: row["loss"]):
        tried.add_row(
            describe_steps(row["steps"]), f"{row['left']:.1%}", f"{row['expected']:.3f}", f"{row['loss']:.3f}"
        )
    console.print(tried)
    curve = Table("layers' size", "least loss expected", "measured", "by", box=box.SIMPLE_HEAD)
    for left, loss, steps in plan.curve[1::2]:
        measured = plan.measured_loss(steps)
        curve.add_row(
            f"{left:.0%}", f"{loss:.3f}", UNKNOWN if measured is None else f"{measured:.3f}", describe_steps(steps)
        )
    console.print(curve)
    console.print(f"{UNKNOWN}: {INTERPOLATED}\n", highlight=False)


def _split(batches: Sequence[Any], settings: FitOptions) -> tuple[list[Any], list[Any]]:
    """Splits the samples into calibration samples and tuning samples."""
    from hf_cod.compression.fit.samples import split_off
    from hf_cod.io.text import describe_batches

    drawn = describe_batches(batches)["samples"]
    if drawn < 2:
        raise ValueError(
            "text: expected at least three samples, for calibration, choice and evaluation, got fewer; use a longer "
            "text or a shorter --sequence-length"
        )
    return split_off(batches, settings.tuning_samples / (settings.max_samples + settings.tuning_samples))


def _told_plan(plan: FitPlan) -> str:
    from hf_cod.compression.fit.knobs import describe_steps

    if not plan.steps:
        return (
            f"The model already meets the budget and is left unchanged: {plan.loss:.3f} nats per token on the tuning "
            "samples."
        )
    single = [row for row in plan.tried if len(row["steps"]) == 1]
    best = min(single, key=lambda row: row["loss"], default=None)
    compared = ""
    if best is not None and best["steps"] != plan.steps:
        compared = f"; the best single method: {describe_steps(best['steps'])}, {best['loss']:.3f}"
    return (
        f"Chosen: {describe_steps(plan.steps)}: {plan.loss:.3f} nats per token on the tuning samples (intact "
        f"{plan.intact_loss:.3f}{compared})."
    )
