"""hf-cod card RUN: a pre-trained model with its model card, ready to share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cod.cli.output import require_plots
from hf_cod.cli.parser import SettingsParser
from hf_cod.reporting.settings import CardSettings


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [CardSettings],
        prog="hf-cod card",
        description="Writes a model that examples/pretrain.py trained, in bfloat16 with the code that loads it, and a "
        "model card with figures and pictures from the run's own report.",
    )
    parser.add_argument("run", help="output directory of examples/pretrain.py")
    parser.add_argument("output", help="directory to write; upload it to the Hub as it is")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    settings, rest = make_parser().parse(arguments)
    from hf_cod.reporting.model_card import release

    require_plots()
    card = release(rest.run, rest.output, settings)
    size = sum(path.stat().st_size for path in Path(rest.output).glob("*.safetensors"))
    print(f"written to {card.resolve()}; weights {size / 2**20:.1f} MiB")
    return 0
