"""Common part of the training commands: output directory, report and model card."""

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
from hf_cod.training.runs.run_directory import check_claim, claim, half_checkpoints, last_steps, lost_checkpoints

# (name in the message, file whose directory is printed).
_WRITTEN = (
    ("model", "config.json"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter/adapter_config.json"),
)


def train_into(
    directory: Path,
    identity: dict[str, Any],
    source: str,
    pictures: PlotSettings,
    run: Callable[[OutputDirectory], RunReport],
) -> None:
    """Trains in the directory of a run and prints the report; a run that was killed at its very end is only completed.

    Args:
        directory: the directory of the run.
        identity: JSON-like identity of the run.
        source: the model's directory or name.
        pictures: settings of plots.
        run: function that trains, and writes the model to the results of the directory.
    """
    with OutputDirectory(
        directory,
        identity,
        check=lambda path: check_claim(path, identity),
        source=source,
        half=half_checkpoints,
        lost=lost_checkpoints,
    ) as output:
        if output.completed:
            report = RunReport.load(directory)
        else:
            claim(directory, identity)
            report = run(output)
            finish(report, output, pictures)
    print_report(report)
    for what, name in _WRITTEN:
        if (directory / name).is_file():
            say(f"\n{what} written to {(directory / name).resolve().parent}")


def finish(report: RunReport, output: OutputDirectory, pictures: PlotSettings) -> None:
    """Plots and saves the report next to the model, moves all to their final places, and removes the checkpoints."""
    if pictures.plots:
        report.plot(output.results, pictures.plot_format)
    report.save(output.results)
    card_outputs(output.results, report, output.path.resolve().name)
    output.finish([path.name for _, path in last_steps(output.path)])
