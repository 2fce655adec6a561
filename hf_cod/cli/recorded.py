"""The shell command of a run, reconstructed from its report, without local paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_cod.cli.main import COMMANDS
from hf_cod.cli.option_groups import FIRST, GROUPS
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.display import shell_word
from hf_cod.io.report import RunReport
from hf_cod.io.rows import text_notes
from hf_cod.io.settings import TextSettings
from hf_cod.reporting.result_card import SOURCES, public_value, source_of, write_cards
from hf_cod.reporting.settings import CardSettings
from hf_cod.scoring.settings import OPTIONS

# Option -> settings in a report that follow from it, and that the command refuses next to it.
DECIDED = {
    "scores": ("score", *OPTIONS),
    "plan": ("criterion",),
    "tokens": ("steps",),
}
# Entry of a report's settings that is no option -> its meaning.
MEASURED = {"samples": "number of calibration samples", "tokens": "number of calibration tokens"}


def with_inputs(report: RunReport, *inputs: Any) -> RunReport:
    """The report of a command, with the settings of its inputs (model loading, text, ...) among its settings, and what
    the text was read as among its notes.
    """
    told = {name: value for each in inputs for name, value in asdict(each).items()}
    notes = [note for each in inputs if isinstance(each, TextSettings) for note in text_notes(each)]
    return replace(report, settings={**report.settings, **told}, notes=[*notes, *report.notes])


def card_outputs(
    directory: Path, report: RunReport, name: str | None = None, settings: CardSettings | None = None
) -> list[Path]:
    """Writes the model card of each model and adapter in a run's directory; see `write_cards`."""
    return write_cards(directory, report, name, command_of(report), settings, meanings_of(report))


def command_of(report: RunReport) -> str | None:
    """The command with the options that its settings need, without defaults; None for reports of other origin."""
    if report.kind not in COMMANDS:
        return None
    parser = parser_of(report.kind)
    values = {**dict.fromkeys(SOURCES, source_of(report)), **parser.current_names(report.settings)}
    decided = {name for option, names in DECIDED.items() if values.get(option) is not None for name in names}
    values = _needed(parser, {name: value for name, value in values.items() if name not in decided})
    words = parser.words({name: public_value(v) for name, v in values.items()})
    return " ".join(map(shell_word, ["hf-cod", report.kind, *words]))


def meanings_of(report: RunReport) -> dict[str, str] | None:
    """Setting -> meaning, by the help text of its option: the main settings, and those that are not the defaults.

    Settings that are no options follow from the samples or from the plan. None for reports of other origin.
    """
    if report.kind not in COMMANDS:
        return None
    parser = parser_of(report.kind)
    options, current = parser._options(), parser.current_names({name: name for name in report.settings})
    renamed = {earlier: name for name, earlier in current.items()}
    found = {}
    for name, value in report.settings.items():
        option = options.get(renamed.get(name, name))
        if option is None:
            found[name] = MEASURED.get(name, "")
        elif value != option.default or (option.dest in GROUPS[FIRST] and value is not False):
            found[name] = re.split(r"; default:|; no default| \(default:", str(option.help).replace("%%", "%"))[0]
    return found


def parser_of(command: str) -> SettingsParser:
    """The parser of a command."""
    parser: SettingsParser = import_module(f"hf_cod.cli.commands.{COMMANDS[command][0]}").make_parser()
    return parser


def _needed(parser: SettingsParser, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that the settings get from their defaults or from other values."""
    needed = dict(values)
    for each in parser.settings:
        own = {
            f.name: values[f.name] for f in fields(each) if f.init and not _default(parser, f.name, values.get(f.name))
        }
        for name in list(own):
            fewer = {other: value for other, value in own.items() if other != name}
            if _same(each, own, fewer):
                own = fewer
                del needed[name]
    return needed


def _default(parser: SettingsParser, name: str, value: Any) -> bool:
    return value is None or value == parser.get_default(name)


def _same(settings: type, these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """Whether a dataclass has the same settings, with its defaults filled in, from both; False if it refuses one."""
    try:
        made = [settings(**values) for values in (these, those)]
    except (TypeError, ValueError):  # a required field is missing, or this machine lacks the device
        return False
    one, other = (each.resolved() if hasattr(each, "resolved") else asdict(each) for each in made)
    return bool(one == other)
