"""hf-cod fit MODEL --memory 4GB | --parameters 0.6 | --bits 3.2: the best combination of methods within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hf_cod.cli.compression import (
    MeasuringSettings,
    ResultsOutput,
    SpeedSettings,
    describe_perplexity,
    describe_speed,
    load_with_tokenizer,
    measure_perplexity,
    speeds_of,
    split_text,
    write_results,
)
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.cli.sizes import parse_bytes
from hf_cod.compression.fit.budget import check_budget
from hf_cod.compression.fit.fit_plan import FitPlan
from hf_cod.compression.fit.knobs import Applying, describe_steps
from hf_cod.compression.fit.planning import plan_fit
from hf_cod.compression.fit.trials import apply_steps
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, environment, format_number
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches, split_samples
from hf_cod.layers.devices import execution_device
from hf_cod.layers.size import size_of
from hf_cod.layers.task import LANGUAGE_MODELS, task_of


@dataclass
class FitSettings(SpeedSettings, MeasuringSettings):
    """What the model must meet, and how the way there is found."""

    memory: str | None = field(
        default=None, metadata={"help": "budget: the whole model in memory, such as 4GB or 600MiB"}
    )
    parameters: float | None = field(
        default=None, metadata={"help": "budget: share of the weights of the layers' matrices; dense ones remain"}
    )
    bits: float | None = field(
        default=None, metadata={"help": "budget: stored bits for each weight that the layers' matrices have"}
    )
    knobs: list[str] = field(
        default_factory=list, metadata={"help": "what to choose from; default: all that can help", "nargs": "*"}
    )
    tuning_samples: int = field(default=16, metadata={"help": "samples, apart from the others, to choose the plan on"})
    verify: int = field(
        default=3, metadata={"help": "combinations that are measured as a whole, beside each knob alone"}
    )
    plan_only: bool = field(default=False, metadata={"help": "show the plan and the trade-off, and stop there"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("memory", "parameters", "bits") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget: expected one of --memory, --parameters and --bits, got {' and '.join(given) or 'none'}"
            )
        for name, least in (("tuning_samples", 1), ("verify", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        check_budget(*self.budget())

    def budget(self) -> tuple[str, float]:
        """Kind and value."""
        if self.memory is not None:
            return "memory", parse_bytes(self.memory, "memory")
        if self.parameters is not None:
            return "parameters", self.parameters
        assert self.bits is not None
        return "bits", self.bits


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FitSettings, ResultsOutput],
        prog="hf-cod fit",
        description="Makes a model meet a budget with the least loss: measures what each method costs alone, shows "
        "the best combination and the trade-off, then applies it and writes a model that from_pretrained loads where "
        "hf_cod is imported. Interrupted, the same command goes on where it stopped. The model itself is never "
        "touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, files, rest = parser.parse(arguments)
    return write_results("fit", rest.model, files, partial(run, rest.model, loading, text, settings))


def run(
    source: str, loading: ModelSettings, text: TextSettings, settings: FitSettings, journal: Path, output: Path
) -> RunReport | None:
    """Plans, shows the plan, applies it, saves, and measures what was saved; memory never holds two models."""
    model, tokenizer = load_with_tokenizer(source, loading)
    if task_of(model) not in LANGUAGE_MODELS:
        raise ValueError(f"model: expected a language model, whose loss can be measured, got {type(model).__name__}")
    both, evaluation = split_text(
        model, tokenizer, text, replace(settings, max_samples=settings.max_samples + settings.tuning_samples)
    )
    calibration, tuning = _split(both, settings)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    before = size_of(model, settings.layers_path)
    speeds = {} if settings.plan_only else speeds_of({"intact": model}, evaluation, settings)
    described = environment(execution_device(model), next(model.parameters()).dtype)
    del model
    options: dict[str, Any] = {"journal": journal, "layers_path": settings.layers_path, "show_progress": True}
    plan = plan_fit(
        lambda: load_model(source, loading)[0],
        *settings.budget(),
        calibration,
        tuning,
        knobs=settings.knobs or None,
        verify=settings.verify,
        **options,
    )
    print_plan(plan, with_notes=settings.plan_only)
    if settings.plan_only:
        return None
    fitted: Any = load_model(source, loading)[0]
    apply_steps(fitted, plan.steps, Applying(calibration, journal, settings.layers_path, show_progress=True))
    fitted.save_pretrained(output)
    tokenizer.save_pretrained(output)
    plan.save(output / "fit_plan.json")
    del fitted
    saved, _ = load_model(str(output), replace(loading, revision="main"))
    perplexities["fitted"] = measure_perplexity(saved, evaluation, settings)
    speeds |= speeds_of({"fitted": saved}, evaluation, settings)
    results = {
        "plan": asdict(plan),
        "size": {"intact": asdict(before), "fitted": asdict(size_of(saved, settings.layers_path))},
        "disk_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "perplexity": perplexities,
        "speed": speeds,
        "evaluation": describe_batches(evaluation),
    }
    told = {**asdict(settings), "text": text.text, **describe_batches(calibration)}
    summary = [
        _told_plan(plan),
        _told_size(results),
        *describe_perplexity(results, "fitted"),
        *describe_speed(results, "fitted"),
    ]
    return RunReport("fit", model_title(source), told, described, {}, results, summary, plan.notes)


def print_plan(plan: FitPlan, with_notes: bool) -> None:
    """What was measured, what was chosen, and the trade-off; a report repeats the notes."""
    console = Console()
    if not plan.steps:
        console.print(f"• {_told_plan(plan)}", highlight=False)
        return
    tried = Table("tried", "layers left", "loss expected", "measured", box=box.SIMPLE_HEAD)
    for row in sorted(plan.tried, key=lambda row: row["loss"]):
        tried.add_row(
            describe_steps(row["steps"]), f"{row['left']:.1%}", f"{row['expected']:.3f}", f"{row['loss']:.3f}"
        )
    console.print(tried)
    curve = Table("layers left", "least loss expected", "by", box=box.SIMPLE_HEAD)
    for left, loss, steps in plan.curve[1::2]:
        curve.add_row(f"{left:.0%}", f"{loss:.3f}", describe_steps(steps))
    console.print(curve)
    for line in (_told_plan(plan), *(plan.notes if with_notes else ())):
        console.print(f"• {line}", highlight=False)


def _split(batches: Sequence[Batch], settings: FitSettings) -> tuple[list[Batch], list[Batch]]:
    """Of the samples in front of those that are reported on: to calibrate on, and to choose by."""
    drawn = describe_batches(batches)["samples"]
    if drawn < 2:
        raise ValueError("text: expected at least three samples, to calibrate, choose and measure on; got too few")
    share = settings.tuning_samples / (settings.max_samples + settings.tuning_samples)
    return split_samples(batches, drawn - min(drawn - 1, max(1, round(drawn * share))))


def _told_plan(plan: FitPlan) -> str:
    if not plan.steps:
        return (
            f"The model meets the budget as it is, and nothing is done to it: {plan.loss:.3f} nats a token on the "
            "samples that plans are compared on."
        )
    single = [row for row in plan.tried if len(row["steps"]) == 1]
    best = min(single, key=lambda row: row["loss"], default=None)
    compared = "" if best is None else f"; the best single method: {describe_steps(best['steps'])}, {best['loss']:.3f}"
    return (
        f"Chosen: {describe_steps(plan.steps)}: {plan.loss:.3f} nats a token on the samples that plans are compared on "
        f"(intact {plan.intact_loss:.3f}{compared})."
    )


def _told_size(results: dict[str, Any]) -> str:
    before, after = results["size"]["intact"], results["size"]["fitted"]
    bits = 8 * after["layer_bytes"] / before["layer_weights"]
    return (
        f"The whole model takes {after['bytes'] / 1e6:,.1f} MB in memory, {before['bytes'] / 1e6:,.1f} before "
        f"({format_number(results['disk_bytes'] / 1e6)} MB on disk); {format_number(bits)} bits for each weight that "
        f"the layers' matrices had, of which {after['layer_weights'] / before['layer_weights']:.1%} are left."
    )
