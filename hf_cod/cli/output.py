"""The output directory of a command: model, report, plots and card, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cod.cli.settings import PlotSettings
from hf_cod.io.display import say

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.reporting.comparison import Comparison


def one_directory(by_position: str | None, by_option: str | None) -> str | None:
    """The output directory of a command that takes it by position or by `--output`; None: neither is given.

    Raises:
        ValueError: both are given.
    """
    if by_position is not None and by_option is not None:
        raise ValueError(f"output: expected one directory, got {by_position!r} and {by_option!r}")
    return by_position or by_option


def write_model(
    output: OutputDirectory,
    run: Callable[[OutputDirectory], RunReport | None],
    pictures: PlotSettings | None = None,
    spent: Callable[[OutputDirectory], Sequence[str]] | None = None,
) -> RunReport | None:
    """Runs a command in its output directory and prints the report.

    If an earlier start of the same command was killed while it finished, only its move of the results is completed.

    Args:
        output: the directory, not entered yet.
        run: writes the model to the results of the directory, and returns its report; None if there is no model.
        pictures: settings of plots; None: no plots.
        spent: returns the names of files that are not needed any more after the run; see `OutputDirectory.finish`.

    Returns:
        The report, if there is a model.
    """
    from hf_cod.cli.terminal import print_report
    from hf_cod.io.report import RunReport

    with output:
        report = RunReport.load(output.path) if output.completed else run(output)
        if report is None:
            return None
        if not output.completed:
            finish(report, output, pictures, () if spent is None else spent(output))
    print_report(report)
    return report


def finish(
    report: RunReport, output: OutputDirectory, pictures: PlotSettings | None = None, spent: Sequence[str] = ()
) -> None:
    """Saves plots, report and model card next to the model, and moves all results to their final places.

    Args:
        report: the report.
        output: the directory, with the model in its results.
        pictures: settings of plots; None: no plots.
        spent: names of files that are not needed any more; see `OutputDirectory.finish`.
    """
    from hf_cod.cli.recorded import card_outputs

    save_report(report, output.results, pictures)
    card_outputs(output.results, report, output.path.resolve().name)
    output.finish(spent)


def say_written(path: Path, more: str = "") -> None:
    """Prints the last line of a command: where its results are.

    Args:
        path: the directory or file of the results.
        more: what follows on the same line.
    """
    say(f"\nwritten to {path.resolve()}{more}")


def save_report(report: RunReport, results: Path, pictures: PlotSettings | None) -> None:
    """Saves the report and its plots in a directory, such as the results of an output directory; None: no plots."""
    if pictures is not None and pictures.plots:
        report.plot(results, pictures.plot_format)
    report.save(results)  # after the plots, so that report.md shows them


def save_page(shown: RunReport | Comparison, results: Path, name: str = "report.html") -> None:
    """Saves the interactive page of a report or a comparison in a directory."""
    from hf_cod.io.files import write_text

    write_text(results / name, shown.to_html())


def require_plots() -> None:
    """Checks that matplotlib is installed, before a long run instead of after it.

    Raises:
        ImportError: matplotlib is not installed; the message gives the pip command.
    """
    try:
        import hf_cod.reporting.plots  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}, or use --no-plots") from error
