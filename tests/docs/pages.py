"""What the documentation holds: its pages, the commands and the Python in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [body for language, body in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if language in languages]


def lines(page: str) -> list[str]:
    """Command lines of a page: of its shell blocks, and of the table of README, without comments."""
    text = read(page)
    found = []
    for block in blocks(text, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in " ".join(shlex.split(line, comments=True, posix=False)).split("&&")]
    if page == "README.md":
        found += [cells[2] for cells in rows(text) if cells[2].startswith("hf-cod ")]
    return [line for line in found if line]


def commands(page: str) -> list[list[str]]:
    """Arguments of each `hf-cod` command of a page."""
    return [shlex.split(line)[1:] for line in lines(page) if line.startswith("hf-cod ")]


def rows(text: str) -> list[list[str]]:
    """Rows of README's table of tasks: [task, command, Python, page] behind an empty first cell."""
    table = [line.split("|") for line in text.splitlines() if "`<br>`" in line]
    return [[cell.strip().strip("`") for cell in cells] for cells in table]


def snippets(page: str) -> list[str]:
    """Python of a page: its blocks, and the cells of README's table; without that of a script, which has a title."""
    text = read(page)
    found = blocks(text, "python")
    if page == "README.md":
        found += [cells[3].replace("`<br>`", "\n") for cells in rows(text)]
    return found
