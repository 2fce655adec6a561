"""The shell command of a run, reconstructed from its report, without local paths."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path

from hf_cod.cli.main import COMMANDS
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.report import RunReport
from hf_cod.reporting.result_card import SOURCES, public_value, source_of, write_cards
from hf_cod.reporting.settings import CardSettings


def card_outputs(
    directory: Path, report: RunReport, name: str | None = None, settings: CardSettings | None = None
) -> list[Path]:
    """Writes the model card of each model and adapter in a run's directory; see `write_cards`."""
    return write_cards(directory, report, name, command_of(report), settings)


def command_of(report: RunReport) -> str | None:
    """The command with all options that differ from their defaults; None for reports of other origin."""
    if report.kind not in COMMANDS:
        return None
    module = import_module(f"hf_cod.cli.commands.{COMMANDS[report.kind][0]}")
    parser: SettingsParser = module.make_parser()
    values = {**dict.fromkeys(SOURCES, source_of(report)), **report.settings}
    return shlex.join(["hf-cod", report.kind, *parser.words({name: public_value(v) for name, v in values.items()})])
