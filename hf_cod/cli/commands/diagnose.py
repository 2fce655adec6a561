"""hf-cod diagnose MODEL: measure the contribution of each layer of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.analysis.diagnostics.settings import METRICS, DiagnoseSettings
from hf_cod.cli.output import require_plots, save_page, save_report, say_written
from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.cli.settings import PlotSettings
from hf_cod.io.display import one_line
from hf_cod.io.settings import ModelSettings, TextSettings

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport


@dataclass
class OutputSettings(PlotSettings):
    """Settings of the output directory."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "directory for report.json, report.md, report.html and plots; default: hf-cod-diagnose-MODEL"
        },
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, DiagnoseSettings, OutputSettings],
        prog="hf-cod diagnose",
        description="Measures the contribution of each layer of a model: angular distance between layers, cost of its "
        "removal, gradient norm, output variance and, with --tasks, what the model answers without it; with --metrics, "
        "also usefulness, causal and permutation scores, Jacobians, attention sinks, massive activations and the logit "
        "lens. After an interruption the same command resumes.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, output, rest = make_parser().parse(arguments)
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.text import load_texts

    if settings.tasks:
        from hf_cod.analysis.generation.sources import check_tasks

        check_tasks(settings.tasks)  # before the model is loaded
    texts = load_texts(text)
    if output.plots:
        require_plots()
    path = output.output or default_directory("diagnose", rest.model)
    with OutputDirectory(path, source=rest.model, check=_check_reused) as directory:
        model, tokenizer = load_with_tokenizer(rest.model, loading, "hf_cod.diagnose in Python", adapters=True)
        name = model_title(rest.model)
        _tell_cost(model, settings)
        report, status = run(model, tokenizer, texts, settings, directory.path, name, loading, text)
        finish(report, directory, output)
    return status


def _tell_cost(model: Any, settings: DiagnoseSettings) -> None:
    """Says what generation and the measures on request cost, before they start."""
    from hf_cod.analysis.diagnostics.generation_drop import sweep_cost
    from hf_cod.analysis.diagnostics.more_measures import more_cost
    from hf_cod.io.display import say
    from hf_cod.layers.stack import find_decoder_layers

    depth, how = len(find_decoder_layers(model, settings.layers_path)), settings.generation()
    if settings.tasks:
        say(sweep_cost(depth, len(settings.tasks) * how.max_prompts, how))
    if told := more_cost(depth, settings.metrics or ()):
        say(told)


def _check_reused(directory: Path) -> None:
    """Checks that files with the names of our results are ours."""
    from hf_cod.io.journal import check_journal
    from hf_cod.io.output_checks import REPORT, check_reused
    from hf_cod.io.report import PAGE, RunReport
    from hf_cod.reporting.html.page import check_page

    ours = {REPORT: RunReport.load, PAGE: check_page, "journal.jsonl": check_journal}
    check_reused(directory, ours, ("overview", *METRICS))


def run(
    model: Any,
    tokenizer: Any,
    texts: Any,
    settings: DiagnoseSettings,
    directory: str | Path,
    name: str,
    loading: ModelSettings,
    text: TextSettings,
) -> tuple[RunReport, int]:
    """Diagnoses a model, with the journal in `directory`; the report has the settings of model loading and text, too.

    If a measure fails, prints the error and returns the earlier results with exit status 1.
    """
    from hf_cod.analysis.diagnostics.diagnosis import MeasurementError, diagnose
    from hf_cod.cli.recorded import with_inputs

    try:
        report = diagnose(model, tokenizer, texts, journal=directory, name=name, **asdict(settings))
        return with_inputs(report, loading, text), 0
    except MeasurementError as error:
        if not error.report.layers:
            raise
        print(f"hf-cod diagnose: error: {one_line(error)}; earlier measurements are kept", file=sys.stderr)
        return with_inputs(error.report, loading, text), 1


def finish(report: RunReport, output: OutputDirectory, pictures: PlotSettings) -> None:
    """Plots, saves and prints a report, with its page."""
    from hf_cod.cli.terminal import print_report

    save_report(report, output.results, pictures)
    save_page(report, output.results)
    output.finish()
    print_report(report)
    say_written(output.path)
