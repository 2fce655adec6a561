"""hf-cod report RUN ...: show finished runs again, in the terminal, as an interactive page or as a Space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cod.cli.output import say_written
from hf_cod.cli.parser import SettingsParser

if TYPE_CHECKING:
    from hf_cod.io.report import RunReport


@dataclass
class ReportOptions:
    """What is written."""

    html: bool = field(
        default=False,
        metadata={
            "help": "write one interactive HTML file, which loads nothing from elsewhere; several runs are linked by "
            "relative depth"
        },
    )
    space: str | None = field(
        default=None,
        metadata={
            "help": "USER/NAME of a static Space of the Hub: write a directory with this page for it; default: none"
        },
    )
    upload: bool = field(
        default=False,
        metadata={"help": "upload the directory of --space to the Hub; requires a token (hf auth login)"},
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "the HTML file; default: report.html in the directory of the run, hf-cod-report.html for several "
            "runs. With --space the directory; default: hf-cod-space-NAME"
        },
    )

    def __post_init__(self) -> None:
        if self.html and self.space is not None:
            raise ValueError(f"space: expected either --html or --space, got both, with {self.space!r}")
        if self.upload and self.space is None:
            raise ValueError("upload: expected --space USER/NAME with --upload, got none")
        if self.output is not None and not self.html and self.space is None:
            raise ValueError(f"output: expected --html or --space with --output, got {self.output!r} alone")


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ReportOptions],
        prog="hf-cod report",
        description="Shows the reports of finished runs again: in the terminal, as one interactive HTML file, or as a "
        "static Space. The page has bars by layer for each measure, the angular distances between all layers, and a "
        "budget that it turns into removed layers, sparsities or bits of each layer, with size and expected metric.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or its report.json")
    parser.add_argument("--labels", nargs="+", help="one name per run; default: the names of the models")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    options, chosen = make_parser().parse(arguments)
    from hf_cod.io.report import RunReport

    reports = [RunReport.load(run) for run in chosen.runs]
    labels = chosen.labels
    if labels is not None and len(labels) != len(reports):
        raise ValueError(f"labels: expected {len(reports)}, one for each run, got {len(labels)}")
    if options.html:
        return _write_page(reports, labels, _page_path(options.output, chosen.runs))
    if options.space is not None:
        return _write_space(reports, labels, options)
    from hf_cod.cli.terminal import print_report

    for report in reports:
        print_report(report)
    return 0


def _page_path(output: str | None, runs: Sequence[str]) -> Path:
    from hf_cod.io.report import PAGE

    if output is not None:
        return Path(output)
    place = Path(runs[0])
    return (place if place.is_dir() else place.parent) / PAGE if len(runs) == 1 else Path(f"hf-cod-{PAGE}")


def _write_page(reports: Sequence[RunReport], labels: Sequence[str] | None, path: Path) -> int:
    from hf_cod.io.display import one_line
    from hf_cod.io.files import write_text
    from hf_cod.reporting.html.page import check_page, page_of

    if path.is_dir():
        raise ValueError(f"output: expected a file, got the directory {str(path)!r}")
    if path.exists():
        try:
            check_page(path)
        except ValueError as error:
            raise ValueError(
                f"output: expected a new file, or an earlier page, got {str(path)!r}: {one_line(error)}; move it, or "
                "name another --output"
            ) from error
    write_text(path, page_of(reports, labels or [report.model for report in reports], _summary(reports, labels)))
    say_written(path)
    return 0


def _write_space(reports: Sequence[RunReport], labels: Sequence[str] | None, options: ReportOptions) -> int:
    from hf_cod.io.hub import upload_space
    from hf_cod.io.output_checks import check_readable
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.reporting.html.page import check_page
    from hf_cod.reporting.space import CARD, INDEX, check_card, check_space_id, write_space

    name = str(options.space)
    check_space_id(name)
    directory = Path(options.output or f"hf-cod-space-{name.rpartition('/')[2]}")
    ours = {INDEX: check_page, CARD: check_card}
    with OutputDirectory(directory, check=lambda path: check_readable(path, ours)) as output:
        write_space(output.results, reports, labels, _summary(reports, labels))
        output.finish()
    told = f"; uploaded to {upload_space(name, directory, [INDEX, CARD])}" if options.upload else ""
    say_written(directory, told)
    return 0


def _summary(reports: Sequence[RunReport], labels: Sequence[str] | None) -> list[str]:
    """The sentences of a single report; of several ones those of a comparison, if they are of diagnose."""
    from hf_cod.reporting.comparison import compare

    if len(reports) == 1:
        return reports[0].summary
    return compare(reports, labels).verdict if all(report.kind == "diagnose" for report in reports) else []
