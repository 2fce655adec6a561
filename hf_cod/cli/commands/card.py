"""hf-cod card DIRECTORY: the model card of a command's result, or of a pre-trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cod.cli.output import one_directory, require_plots, say_written
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.display import say
from hf_cod.io.inputs import check_run_directory
from hf_cod.reporting.settings import CardSettings

if TYPE_CHECKING:
    from hf_cod.io.report import RunReport


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [CardSettings],
        prog="hf-cod card",
        description="Writes the model card (README.md) into an output directory of prune, factorize, narrow, "
        "drop-layers, repeat-layers, pack, quantize, fit, heal, finetune or convert. With the directory of a "
        "training by examples/pretrain.py, writes into OUTPUT a copy of the model in bfloat16, the code that loads "
        "it, and a card with figures and plots.",
    )
    parser.add_argument("directory", help="output directory of a command, or of examples/pretrain.py")
    told = "directory to write, for examples/pretrain.py only; it can be uploaded to the Hub"
    parser.add_argument("target", nargs="?", metavar="output", help=told)
    parser.add_argument("--output", help=f"{told}; default: the second argument")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    settings, rest = make_parser().parse(arguments)
    output = one_directory(rest.target, rest.output)
    check_run_directory(rest.directory, "directory")
    from hf_cod.reporting.result_card import report_of

    report, name = report_of(rest.directory)
    if report.kind == "pretrain" and output is None:
        raise ValueError(f"output: expected a directory for the model of {rest.directory!r}, got none")
    if output is not None:
        return _release(rest.directory, output, settings)
    return _card(Path(rest.directory), report, name, settings)


def _card(directory: Path, report: RunReport, name: str, settings: CardSettings) -> int:
    from hf_cod.cli.recorded import card_outputs
    from hf_cod.reporting.result_card import check_cards

    for field in ("sources", "comparison", "where"):
        if getattr(settings, field) is not None:
            raise ValueError(f"{field}: expected none for a run of {report.kind}, got {getattr(settings, field)!r}")
    check_cards(directory)
    for card in card_outputs(directory, report, name, settings):
        say(f"written to {card.resolve()}")
    return 0


def _release(run: str, output: str, settings: CardSettings) -> int:
    from hf_cod.layers.size import disk_bytes
    from hf_cod.reporting.model_card import release

    require_plots()
    card = release(run, output, settings)
    say_written(card, f"; weights {disk_bytes(output) / 1e6:.1f} MB")
    return 0
