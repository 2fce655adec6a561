"""hf-cod compare RUN RUN ...: compare several diagnosed runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cod.cli.output import save_page, say_written
from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import PlotSettings


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [PlotSettings],
        prog="hf-cod compare",
        description="Compares several runs of hf-cod diagnose, for example Pre-LN with Post-LN, or a base model with "
        "its fine-tuned version.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a diagnosed run, or its report.json")
    parser.add_argument("--labels", nargs="+", help="one name per run; default: the names of the models")
    parser.add_argument(
        "--output",
        default="hf-cod-compare",
        help="directory for compare.md, compare.html and compare.png (or pdf, svg, see --plot-format); default: "
        "hf-cod-compare",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    pictures, chosen = make_parser().parse(arguments)
    from hf_cod.cli.terminal import print_comparison
    from hf_cod.io.files import write_text
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.reporting.comparison import compare

    comparison = compare([RunReport.load(run) for run in chosen.runs], chosen.labels)
    directory = Path(chosen.output)
    picture = f"compare.{pictures.plot_format}" if pictures.plots else None
    with OutputDirectory(directory, check=_check_reused) as output:
        if picture is not None:
            comparison.plot(output.results, pictures.plot_format)
        write_text(output.results / "compare.md", comparison.to_markdown(picture))
        save_page(comparison, output.results, "compare.html")
        output.finish()
    print_comparison(comparison)
    say_written(directory)
    return 0


def _check_reused(directory: Path) -> None:
    """Checks that files with the names of our results are those of an earlier comparison."""
    from hf_cod.io.output_checks import check_pages, check_readable
    from hf_cod.io.reading import read_text
    from hf_cod.io.schema import brief
    from hf_cod.reporting.html.page import check_page as check_html

    def check_page(path: Path) -> None:
        if not (text := read_text(path, "compare")).startswith("# compare: "):
            raise ValueError(f"compare: expected a page of hf-cod compare, got {brief(text)}")

    check_pages(directory, "compare.md", "compare.md", ("compare",))
    check_readable(directory, {"compare.md": check_page, "compare.html": check_html})
