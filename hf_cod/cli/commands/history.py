"""hf-cod history RUN: plot the layer measurements of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hf_cod.cli.output import save_report, say_written
from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import PlotSettings


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [PlotSettings],
        prog="hf-cod history",
        description="Plots the measurements of LayerDiagnosticsCallback or LayerMonitor, also while the training runs: "
        "heat maps over layers and steps, and effective depth. The table shows the last measured step.",
    )
    parser.add_argument(
        "run", help="history.jsonl, the directory that holds it, or the output directory of the training"
    )
    parser.add_argument("--output", help="directory for report and plots; default: directory of the history")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    pictures, chosen = make_parser().parse(arguments)
    from hf_cod.analysis.monitoring.history import TrainingHistory
    from hf_cod.cli.terminal import print_report
    from hf_cod.io.output_checks import REPORT, check_reused
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport

    history = TrainingHistory.load(chosen.run)
    assert history.path is not None
    report = history.report()
    directory = Path(chosen.output) if chosen.output else history.path.parent
    check = partial(check_reused, readers={REPORT: RunReport.load}, pictures=("overview",))
    with OutputDirectory(directory, check=check) as output:
        report.keep_earlier(directory)
        save_report(report, output.results, pictures)
        output.finish()
    print_report(report)
    say_written(directory)
    return 0
