"""hf-cod compare RUN RUN ...: several diagnosed runs; --model, scores and plans; --swap, two models by their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_cod.cli.output import require_plots, save_page, save_report, say_written
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.cli.settings import PlotSettings
from hf_cod.io.settings import ModelSettings, SampleSettings, TextSettings, check_effect

COMPARED, SWAPPED = "hf-cod-compare", "hf-cod-swap"
DESCRIPTION = (
    "Compares several runs of hf-cod diagnose, for example Pre-LN with Post-LN, or a base model with "
    "its fine-tuned version. With --swap A B it compares two models: it measures the loss of A with layers of B in "
    "their place, one at a time, from the bottom up and from the top down. After an interruption the same command "
    "resumes. With --model it compares scores and plans of that model, also those of other tools. No model is "
    "changed."
)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [PlotSettings, ModelSettings, TextSettings, SampleSettings],
        prog="hf-cod compare",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="directory of a diagnosed run, or its report.json; with --model files of scores and plans: scores.json, "
        "allocation.json, and what import_scores and import_plan read (MLX, AutoRound, .gguf, .csv)",
    )
    parser.add_argument(
        "--model",
        help="compare scores and plans of this model, by rank correlation over layers and matrices; Hub id, directory "
        "or GGUF file; default: runs are compared",
    )
    parser.add_argument(
        "--rest",
        type=float,
        help="with --model: bits of matrices that a layer_config of AutoRound does not name; default: it names all",
    )
    parser.add_argument(
        "--swap",
        nargs=2,
        metavar="MODEL",
        help="instead of runs: measure the loss of the first model on --text with layers of the second one; Hub ids, "
        "directories or GGUF files; default: runs are compared",
    )
    parser.add_argument("--labels", nargs="+", help="one name per run; default: the names of the models")
    parser.add_argument(
        "--output",
        help="directory for compare.md, compare.html and compare.png (or pdf, svg, see --plot-format), with --model "
        "for compare.md, with --swap for report.json, report.md, report.html and swap.png; default: "
        f"{COMPARED}, with --swap {SWAPPED}",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    pictures, loading, text, samples, chosen = make_parser().parse(arguments)
    if chosen.swap:
        return _swap(chosen, pictures, loading, text, samples)
    if chosen.model is not None:
        return _plans(chosen, pictures, loading, text, samples)
    if chosen.rest is not None:
        raise ValueError(f"rest: expected none without --model, got {chosen.rest:g}")
    for settings in (loading, text, samples):
        check_effect(
            settings, [each.name for each in fields(settings)], "runs, which are measured; --swap takes models"
        )
    from hf_cod.cli.terminal import print_comparison
    from hf_cod.io.files import write_text
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.reporting.comparison import compare

    comparison = compare([RunReport.load(run) for run in chosen.runs], chosen.labels)
    directory = Path(chosen.output or COMPARED)
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


def _plans(
    chosen: Any, pictures: PlotSettings, loading: ModelSettings, text: TextSettings, samples: SampleSettings
) -> int:
    """Compares scores and plans of one model."""
    why = "scores and plans, which are read"
    check_effect(pictures, ["plot_format"], why)
    for settings in (text, samples):
        check_effect(settings, [each.name for each in fields(settings)], why)
    if len(chosen.runs) < 2:
        raise ValueError(f"runs: expected at least two files of scores or plans, got {len(chosen.runs)}")
    from hf_cod.cli.terminal import print_comparison
    from hf_cod.io.files import write_text
    from hf_cod.io.models import load_model
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.reporting.plan_comparison import compare_plans
    from hf_cod.scoring.imports.importer import import_either

    labels = chosen.labels or [Path(run).name for run in chosen.runs]
    model, _ = load_model(chosen.model, loading)
    comparison = compare_plans([import_either(model, run, rest=chosen.rest) for run in chosen.runs], labels)
    directory = Path(chosen.output or COMPARED)
    with OutputDirectory(directory, check=_check_reused) as output:
        write_text(output.results / "compare.md", comparison.to_markdown())
        output.finish()
    print_comparison(comparison)
    say_written(directory)
    return 0


def _swap(
    chosen: Any, pictures: PlotSettings, loading: ModelSettings, text: TextSettings, samples: SampleSettings
) -> int:
    """Measures the first model with layers of the second one."""
    for name in ("runs", "labels", "model", "rest"):
        if getattr(chosen, name):
            raise ValueError(f"swap: expected two models alone, got {name} beside them")
    from hf_cod.analysis.diagnostics.layer_swap import check_swap, measure_swap, swap_cost
    from hf_cod.cli.recorded import with_inputs
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.cli.terminal import print_report
    from hf_cod.io.display import say
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.text import load_texts
    from hf_cod.layers.stack import find_decoder_layers

    texts = load_texts(text)
    if pictures.plots:
        require_plots()
    with OutputDirectory(Path(chosen.output or SWAPPED), check=_check_swapped) as output:
        model, tokenizer = load_with_tokenizer(chosen.swap[0], loading, "hf_cod.measure_swap in Python", adapters=True)
        donor, _ = load_with_tokenizer(chosen.swap[1], loading, "hf_cod.measure_swap in Python", adapters=True)
        stack = find_decoder_layers(model)
        check_swap(stack, find_decoder_layers(donor))
        say(swap_cost(len(stack)))
        given: dict[str, Any] = {"tokenizer": tokenizer, "texts": texts, "samples": samples, "journal": output.path}
        names: dict[str, Any] = dict(zip(("name", "donor_name"), map(model_title, chosen.swap), strict=True))
        report = with_inputs(measure_swap(model, donor, **given, **names, show_progress=True), loading, text, samples)
        save_report(report, output.results, pictures)
        save_page(report, output.results)
        output.finish()
    print_report(report)
    say_written(output.path)
    return 0


def _check_swapped(directory: Path) -> None:
    """Checks that files with the names of our results are those of an earlier swap."""
    from hf_cod.io.journal import check_journal
    from hf_cod.io.output_checks import REPORT, check_reused
    from hf_cod.io.report import PAGE, RunReport
    from hf_cod.reporting.html.page import check_page

    ours = {REPORT: RunReport.load, PAGE: check_page, "journal.jsonl": check_journal}
    check_reused(directory, ours, ("swap",))


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
