"""A page of reports as a static Space of the Hub: a directory that is complete without network, and its upload."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_cod.io.display import terminal_text
from hf_cod.io.files import looks_local, write_text
from hf_cod.io.reading import read_text
from hf_cod.io.report import RunReport
from hf_cod.reporting.html.page import page_of
from hf_cod.reporting.loading import public_name

INDEX, CARD = "index.html", "README.md"
TAG = "hf_cod"


def check_space_id(name: str) -> None:
    """Checks the name of a Space.

    Raises:
        ValueError: not USER/NAME as the Hub allows it.
    """
    try:
        validate_repo_id(name)
        allowed = name.count("/") == 1
    except ValueError:
        allowed = False
    if not allowed:
        raise ValueError(f"space: expected USER/NAME of a Space on the Hub, got {name!r}")


def write_space(
    directory: str | Path, reports: Sequence[RunReport], labels: Sequence[str] | None, summary: Sequence[str]
) -> Path:
    """Writes the files of a static Space: README.md, which says what it is, and the page as index.html.

    Of paths on this machine, in names and settings, only the last part is kept.

    Args:
        directory: the directory to write into.
        reports: the reports on the page.
        labels: one name per report; default: the names of the models.
        summary: sentences at the top of the page.

    Returns:
        The directory.
    """
    public = [_public(report) for report in reports]
    names = [report.model for report in public] if labels is None else list(labels)
    title = terminal_text("Layers of " + " and ".join(names))
    front = ["---", f"title: {json.dumps(title)}", "sdk: static", f"app_file: {INDEX}", f"tags: [{TAG}]", "---"]
    told = "The page loads nothing from elsewhere. hf_cod (`hf-cod report RUN --space USER/NAME`) has written it."
    write_text(Path(directory) / INDEX, page_of(public, names, summary))
    write_text(Path(directory) / CARD, "\n".join([*front, "", told, ""]))
    return Path(directory)


def check_card(path: str | Path) -> None:
    """Checks that a README.md is that of such a Space, before it is replaced.

    Raises:
        ValueError: it is another file.
    """
    if f"sdk: static\napp_file: {INDEX}\ntags: [{TAG}]\n" not in read_text(path, "space"):
        raise ValueError(f"space: expected README.md of a Space of hf_cod, got {str(path)!r}")


def _public(report: RunReport) -> RunReport:
    settings = {name: _without_folders(value) for name, value in report.settings.items()}
    return replace(report, model=_without_folders(report.model), settings=settings)


def _without_folders(value: Any) -> Any:
    """Values as they are; of paths the last part, also in lists."""
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return public_name(value) if isinstance(value, str) and (looks_local(value) or "/" in value) else value
