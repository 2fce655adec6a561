"""hf-cod drop-layers MODEL: a model with fewer layers, those that it misses least removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from hf_cod.cli.compression import (
    MeasuringSettings,
    ResultsOutput,
    SpeedSettings,
    describe_perplexity,
    describe_sizes,
    describe_speed,
    load_with_tokenizer,
    measure_perplexity,
    measured_results,
    speeds_of,
    split_text,
    write_results,
)
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.compression.depth.criteria import plan_depth
from hf_cod.compression.depth.depth_plan import DepthPlan
from hf_cod.compression.depth.dropper import drop_layers
from hf_cod.compression.depth.settings import CRITERIA, REPLACEMENTS
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.stack import find_decoder_layers

DEFAULT_PARAMETERS = 0.8


@dataclass
class DropLayersSettings(SpeedSettings, MeasuringSettings):
    """Which layers are removed, and on which samples that is decided."""

    layers: int | None = field(default=None, metadata={"help": "how many layers to remove; default: by parameters"})
    parameters: float | None = field(
        default=None,
        metadata={
            "help": f"share of the layers' weights to keep, layers counted as equal; default: {DEFAULT_PARAMETERS}"
        },
    )
    criterion: str = field(
        default="search",
        metadata={"help": f"what decides which layers go: one of {', '.join(CRITERIA)}"},
    )
    replacement: str = field(
        default="measured",
        metadata={
            "help": "linear maps in the place of layers, folded into the matrices that are there: none, linear, or "
            "measured (where they lower the loss on samples that they were not fitted to)"
        },
    )
    protect: bool = field(default=True, metadata={"help": "never remove a layer where massive activations arise"})
    explain: bool = field(default=False, metadata={"help": "print what each layer costs, and which go"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, valid in (("criterion", tuple(CRITERIA)), ("replacement", REPLACEMENTS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}")
        if self.layers is not None and self.parameters is not None:
            raise ValueError("layers: expected no parameters beside it, which would say how many, too")
        if self.parameters is not None and not 0 < self.parameters < 1:
            raise ValueError(f"parameters: expected a share between 0 and 1, got {self.parameters}")

    def check_beside_plan(self) -> None:
        """Makes sure that nothing was asked for that a plan has decided already.

        Raises:
            ValueError: how many layers, a criterion, or protection.
        """
        decided = ("layers", "parameters", "criterion", "protect")
        given = [f.name for f in fields(self) if f.name in decided and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"plan: expected no {given[0]} beside it, which the plan has decided")

    def count(self, depth: int) -> int:
        """How many of `depth` layers go: the fewest that leave no more than the share of parameters."""
        if self.layers is not None:
            return self.layers
        share = DEFAULT_PARAMETERS if self.parameters is None else self.parameters
        removed = math.ceil((1 - share) * depth - 1e-9)
        if removed >= depth:
            raise ValueError(
                f"parameters: expected at least {1 / depth:.3g}, which leaves one of {depth} layers, got {share}"
            )
        return removed


@dataclass
class DropLayersOutput(ResultsOutput):
    """Where results go, and what is read beside the model."""

    plan: str | None = field(
        default=None, metadata={"help": "depth_plan.json of an earlier run, instead of choosing layers anew"}
    )


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, DropLayersSettings, DropLayersOutput],
        prog="hf-cod drop-layers",
        description="Removes the layers that a model misses least. A stock model stays one, which loads without "
        "hf_cod. Interrupted, the same command goes on where its search stopped. The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, files, rest = parser.parse(arguments)
    if files.plan is not None:
        settings.check_beside_plan()
    return write_results(
        "drop-layers", rest.model, files, partial(run, rest.model, loading, text, settings, files.plan)
    )


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: DropLayersSettings,
    plan_file: str | None,
    journal: Path,
    output: Path,
) -> RunReport:
    """Measures, decides, removes, saves, and measures again what was saved; memory never holds two models."""
    model, tokenizer = load_with_tokenizer(source, loading)
    calibration, evaluation = split_text(model, tokenizer, text, settings)
    plan = DepthPlan.load(plan_file) if plan_file is not None else _plan(model, calibration, settings, journal)
    if settings.explain:
        _explain(plan)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    speeds = speeds_of({"intact": model}, evaluation, settings)
    report = drop_layers(
        model,
        plan,
        settings.replacement,
        batches=calibration,
        layers_path=settings.layers_path,
        name=model_title(source),
    )
    model.save_pretrained(output)  # type: ignore[operator]
    tokenizer.save_pretrained(output)
    plan.save(output / "depth_plan.json")
    del model
    saved, _ = load_model(str(output), replace(loading, revision="main"))
    perplexities["dropped"] = measure_perplexity(saved, evaluation, settings)
    speeds |= speeds_of({"dropped": saved}, evaluation, settings)
    results = measured_results(report, output, perplexities, speeds, evaluation)
    return replace(
        report,
        settings={
            **asdict(settings),
            "criterion": plan.method,
            "text": text.text,
            "plan": plan_file,
            **describe_batches(calibration),
        },
        results=results,
        summary=[
            *report.summary,
            *_told_loading(saved),
            describe_sizes(results, "dropped"),
            *describe_perplexity(results, "dropped"),
            *describe_speed(results, "dropped"),
        ],
    )


def _plan(model: nn.Module, batches: Sequence[Batch], settings: DropLayersSettings, journal: Path) -> DepthPlan:
    depth = len(find_decoder_layers(model, settings.layers_path))
    options: dict[str, Any] = {"layers_path": settings.layers_path, "journal": journal, "show_progress": True}
    options |= {"protect": settings.protect, "replacement": settings.replacement}
    return plan_depth(model, settings.count(depth), settings.criterion, batches=batches, **options)


def _told_loading(saved: Any) -> list[str]:
    """What it takes to load a model that is no stock one; fewer layers change nothing of that."""
    if not saved.config.model_type.startswith("cod_"):
        return []
    return ["As before, it loads where hf_cod is imported, and with trust_remote_code without it."]


def _explain(plan: DepthPlan) -> None:
    table = Table("layer", "cost", "rank", "", title=f"{len(plan.layers)} of {len(plan.parameters)} layers")
    known = {i: cost for i, cost in enumerate(plan.costs) if cost is not None}
    order = sorted(known, key=lambda i: known[i])
    for index in range(len(plan.parameters)):
        told = "removed" if index in plan.layers else "protected" if index in plan.protected else ""
        rank = str(order.index(index) + 1) if index in known else "-"
        table.add_row(str(index), format_number(known.get(index)), rank, told)
    console = Console()
    console.print(table)
    for name, found in plan.candidates.items():
        layers = ", ".join(map(str, found["layers"])) or "none"
        maps = ", with maps in their place," if found.get("maps") else ""
        told = f"{name}: without layers {layers}{maps} the {plan.metric} is {format_number(found['loss'])}"
        console.print(told, highlight=False)
