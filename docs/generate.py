"""Pages that are made when the site is built: the command line, the Python API, and the files of the root.

`mkdocs build` runs this file (mkdocs-gen-files). Options come from the commands' own parsers, the API from docstrings,
which are read without an import; neither torch nor transformers is needed.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

import hf_cod
from hf_cod.cli.main import COMMANDS
from hf_cod.cli.parser import SettingsParser

ROOT = Path(__file__).parent.parent
# Room -> title of its page of the API.
ROOMS = {
    "analysis": "Measure and monitor",
    "scoring": "Score and allocate",
    "compression": "Compress",
    "training": "Train",
    "reporting": "Compare and report",
    "io": "Text, models and files",
    "layers": "Layers",
    "models": "Norm placements and conversion",
}


def command_line() -> Iterator[str]:
    """The page of all commands and their options."""
    yield "# Command line\n"
    yield "This page is generated from the parsers of the commands. Options are accepted with dashes and underscores.\n"
    yield "| command | does |\n|---|---|"
    yield from (f"| [`{name}`](#{name}) | {text} |" for name, (_, text) in COMMANDS.items())
    parsers = {n: importlib.import_module(f"hf_cod.cli.commands.{m}").make_parser() for n, (m, _) in COMMANDS.items()}
    common = next(iter(parsers.values()))._action_groups[-1]
    yield from table(common)
    for name, parser in parsers.items():
        yield f"\n## {name}\n"
        yield from described(parser)


def described(parser: SettingsParser) -> Iterator[str]:
    """One command: what it does, its arguments and its options."""
    description = parser.description or ""
    yield description if "\n" not in description else f"```text\n{description}\n```"
    for group in parser._action_groups[:-1]:  # the last one has the common options
        yield from table(group)


def table(group: argparse._ArgumentGroup) -> Iterator[str]:
    """A table of the arguments or options of a group, by its title."""
    shown = [each for each in group._group_actions if each.help is not argparse.SUPPRESS and each.dest != "help"]
    if shown:
        yield f"\n| {str(group.title).capitalize()} | default | meaning |\n|---|---|---|"
        yield from map(option_row, shown)


def option_row(action: argparse.Action) -> str:
    """A row of the table of options."""
    told = re.sub(r" \(default: [^()]*\)$", "", str(action.help or "").replace("%%", "%"))
    told = told.replace("|", "\\|").replace("<", "&lt;")
    if action.choices is not None and not any(str(choice) in told for choice in action.choices):
        told += f" (one of {', '.join(f'`{choice}`' for choice in action.choices)})"
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{(action.metavar or action.dest)}`"
    default = "required" if action.required else "" if action.default in (None, [], "") else f"`{action.default}`"
    if action.nargs == 0:
        default = "on" if action.default else ""
    return f"| {name} | {default} | {told} |"


def api() -> Iterator[tuple[str, str]]:
    """File -> page of the Python API, a page a room."""
    by_room: dict[str, list[str]] = {}
    for name in sorted(hf_cod._HOMES, key=str.lower):
        by_room.setdefault(hf_cod._HOMES[name].partition(".")[0], []).append(name)
    assert by_room.keys() == ROOMS.keys(), "each room with public names has a page"
    rows = []
    for room, title in ROOMS.items():
        names = by_room[room]
        yield f"{room}.md", f"# {title}\n\n" + "\n".join(f"::: hf_cod.{name}\n" for name in names)
        rows.append(f"| [{title}]({room}.md) | " + ", ".join(f"[`{n}`]({room}.md#hf_cod.{n})" for n in names) + " |")
    head = "# Python API\n\nEvery public name is imported from `hf_cod`: `from hf_cod import diagnose`.\n"
    yield "index.md", f"{head}\n| page | names |\n|---|---|\n" + "\n".join(rows)


def from_root(name: str) -> str:
    """A file of the repository's root as a page; its links to other files of the root become those of pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("(CONTRIBUTING.md)", "(contributing.md)").replace("(CHANGELOG.md)", "(changelog.md)")
    return re.sub(r"\]\(docs/", "](", text)


def write(path: str, text: str) -> None:
    """Adds a page to the site."""
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)


write("reference/cli.md", "\n".join(command_line()))
for page, content in api():
    write(f"reference/api/{page}", content)
write("contributing.md", from_root("CONTRIBUTING.md"))
write("changelog.md", from_root("CHANGELOG.md"))
