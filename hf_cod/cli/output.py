"""The directory that a long command's results go to: never one that holds something else, and complete or not there.

While the command works, the directory holds a journal alone; results are written inside it and move up at the end.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hf_cod.io.files import sync

JOURNAL = "journal"
_RESULT = "result"
# What a journal holds: a layer as FinishedLayers writes it, or one that an interruption cut; and lines of a Journal.
_KEPT = re.compile(r"\.?[0-9a-f]{16}-\d{5}\.safetensors(\..*)?|\.?\w+\.jsonl(\..*)?")


def check_output(directory: Path, model: str) -> None:
    """Makes sure that nothing else is in the directory: it is new, empty, or holds the journal of an interrupted run.

    Raises:
        ValueError: it holds something else, or is the model's own.
    """
    if directory.resolve() == Path(model).expanduser().resolve():
        raise ValueError(f"output: expected another directory than the model's, got {str(directory)!r}")
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(directory)!r}")
    inside = {path.name for path in directory.iterdir()}
    journal = directory / JOURNAL
    ours = journal.is_dir() and all(p.name == _RESULT or _KEPT.fullmatch(p.name) for p in journal.iterdir())
    foreign = inside - ({JOURNAL} if ours else set())
    if foreign:
        raise ValueError(
            f"output: expected a new directory, an empty one, or that of an interrupted run, got {str(directory)!r}, "
            f"which holds {min(foreign)}"
        )


def check_directory(directory: Path) -> None:
    """Makes sure that results can go there.

    Raises:
        ValueError: it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(directory)!r}")


def results_of(directory: Path) -> Path:
    """Where results are written until `finish`: inside the journal. What an interrupted run left there goes."""
    results = directory / JOURNAL / _RESULT
    shutil.rmtree(results, ignore_errors=True)
    return results


def finish(directory: Path, results: Path) -> None:
    """Moves the results up in the place of the journal, once they are on the disk; the journal goes last.

    The directory itself stays: it may be a link, a mount point, or the one that somebody stands in.
    """
    sync(results)
    for path in sorted(results.iterdir()):
        os.replace(path, directory / path.name)
    shutil.rmtree(directory / JOURNAL)


def require_plots() -> None:
    """Says that matplotlib is missing before the long work, not after it.

    Raises:
        ImportError: matplotlib is missing; the message says how to add it.
    """
    try:
        import hf_cod.reporting.plots  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}, or give --no-plots") from error
