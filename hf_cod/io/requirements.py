"""The lowest versions of other packages that this package declares, for install lines that others run.

They are written once, in pyproject.toml; an installed package has them in its metadata.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from hf_cod._version import __version__

NAME = "hf_cod"
# In a clone. It comes first, because the metadata of an editable installation are those of the day it was installed.
SOURCE = Path(__file__).parents[2] / "pyproject.toml"


def requirement(package: str, *extras: str) -> str:
    """A package for `pip install`, with the lowest version that is declared: "transformers>=5.1".

    Of this package it is the version in use, which reads all that it writes.

    Args:
        package: a package that this one, or an extra of it, depends on; or this package.
        extras: extras of it.
    """
    version = __version__ if package == NAME else _declared().get(package)
    named = f"{package}[{','.join(extras)}]" if extras else package
    return named if version is None else f"{named}>={version}"


@cache
def _declared() -> dict[str, str]:
    """Package -> lowest version, of the dependencies and of the extras."""
    found: dict[str, str] = {}
    for line in _lines():
        declared = re.match(r"([\w.-]+)[^;]*>=\s*([\w.]+)", line)
        if declared is not None:
            found.setdefault(*declared.groups())
    return found


def _lines() -> list[str]:
    if SOURCE.is_file():
        project = tomllib.loads(SOURCE.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            extras = project["optional-dependencies"].values()
            return [*project["dependencies"], *(line for extra in extras for line in extra)]
    try:
        return requires(NAME) or []
    except PackageNotFoundError:  # a copy of the source without pyproject.toml
        return []
