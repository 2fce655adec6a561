"""What the commands share that train: how results are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cod.cli.recorded import card_outputs
from hf_cod.cli.settings import PlotSettings
from hf_cod.cli.terminal import print_report
from hf_cod.io.display import say
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.report import RunReport
from hf_cod.training.runs.run_directory import check_claim, claim, half_checkpoints, last_steps

# What is said to be written -> a file that shows where it is.
_WRITTEN = (
    ("model", "config.json"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter/adapter_config.json"),
)


def train_into(
    directory: Path,
    told: dict[str, Any],
    source: str,
    pictures: PlotSettings,
    run: Callable[[OutputDirectory], RunReport],
) -> None:
    """Trains in a directory that is this run's, unless a killed run had all but finished there; prints the report.

    Args:
        directory: the run's.
        told: what tells the run from others, as JSON has it.
        source: the model's directory or name.
        pictures: whether they are drawn, and as what.
        run: trains, and writes the model to the results of the directory.
    """
    with OutputDirectory(
        directory, told, check=lambda path: check_claim(path, told), source=source, half=half_checkpoints
    ) as output:
        if output.completed:
            report = RunReport.load(directory)
        else:
            claim(directory, told)
            report = run(output)
            finish(report, output, pictures)
    print_report(report)
    for what, name in _WRITTEN:
        if (directory / name).is_file():
            say(f"\n{what} written to {(directory / name).resolve().parent}")


def finish(report: RunReport, output: OutputDirectory, pictures: PlotSettings) -> None:
    """Draws and saves the report beside the model, moves all into its place, and removes the checkpoints."""
    if pictures.plots:
        report.plot(output.results, pictures.plot_format)
    report.save(output.results)
    card_outputs(output.results, report, output.path.resolve().name)
    output.finish([path.name for _, path in last_steps(output.path)])
