"""Checks of an output directory before a command starts, and detection of files that killed runs left in it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from hf_cod.io.display import one_line
from hf_cod.io.output_manifest import JOURNAL, MANIFEST, RESULTS
from hf_cod.io.settings import PLOT_FORMATS

LOCK = "lock"  # in the journal
REPORT = "report.json"  # in the directory of a finished run
# Names of files in a journal: layers written by FinishedLayers and JSON lines of a Journal, complete or temporary.
_KEPT = re.compile(r"\.?[0-9a-f]{16}-\d{5}\.safetensors(\..*)?|\.?\w+\.jsonl(\..*)?")
# Temporary files of hf_cod: a dot, the final name, a dot, and eight characters.
_LEFT = re.compile(r"\.[\w-]+\.(gguf|html|json|jsonl|md|pdf|png|safetensors|svg)\.[a-z0-9_]{8}")
_OF_MODELS = (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")
_OF_RESULTS = (".gguf", ".html", ".json", ".jsonl", ".md", ".safetensors", *(f".{name}" for name in PLOT_FORMATS))
_HOUR = 3600.0


def check_place(directory: Path, source: str | None = None) -> None:
    """Checks that a path is a directory or does not exist.

    Raises:
        ValueError: the path is a file, a broken link, or the model's own directory, or its journal is a link, through
            which the command would write somewhere else.
    """
    try:
        if source is not None and directory.resolve() == Path(source).expanduser().resolve():
            raise ValueError(f"output: expected another directory than the model's, got {str(directory)!r}")
        there, reached = os.path.lexists(directory), directory.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        if str(error).startswith("output:"):
            raise
        raise ValueError(f"output: expected the path of a directory, got {str(directory)!r}: {error}") from error
    if there and not reached:
        raise ValueError(f"output: expected a directory, got {str(directory)!r}, a broken link")
    if there and not directory.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(directory)!r}")
    for path in (directory / JOURNAL, *(directory / JOURNAL / name for name in (LOCK, RESULTS, MANIFEST))):
        if path.is_symlink():
            raise ValueError(f"output: expected a journal of hf_cod, got {str(path)!r}, a link; remove it")


def check_unused(directory: Path) -> None:
    """Checks that a directory is new, empty, or holds only the journal of an interrupted run.

    Raises:
        ValueError: the directory holds other files.
    """
    if not directory.is_dir():
        return
    inside = {path.name for path in directory.iterdir() if not is_temporary(path)}
    foreign = inside - ({JOURNAL} if _is_ours(directory / JOURNAL) else set())
    if foreign:
        held = "which holds a finished run" if REPORT in foreign else f"which holds {min(foreign)}"
        raise ValueError(
            "output: expected a new directory, an empty one, or that of an interrupted run, got "
            f"{str(directory)!r}, {held}"
        )


def check_names(directory: Path) -> None:
    """Checks that no directory in a directory has the name of a file that a command may write there.

    Raises:
        ValueError: one has.
    """
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.suffix in _OF_RESULTS and path.is_dir():
            raise ValueError(f"output: expected files in {str(directory)!r}, got the directory {str(path)!r}")


def check_pages(directory: Path, record: str, page: str, pictures: Collection[str] = ()) -> None:
    """Checks that a page and plots, whose origin cannot be read from them, are next to the record that they belong to.

    Args:
        directory: the output directory; it need not exist.
        record: name of the file that a command writes with its page.
        page: name of the page.
        pictures: names of plots, without suffix.

    Raises:
        ValueError: there is a page or a plot, but no record.
    """
    if (directory / record).is_file():
        return
    for name in (page, *(f"{picture}.{suffix}" for picture in pictures for suffix in PLOT_FORMATS)):
        if (directory / name).is_file():
            raise ValueError(
                f"output: expected a directory without {name}, or with that of an earlier run, got "
                f"{str(directory / name)!r} without {record}; move it, or name another --output"
            )


def check_reused(
    directory: Path, readers: Mapping[str, Callable[[Path], object]], pictures: Collection[str] = ()
) -> None:
    """Checks that a command may write its results next to its earlier ones.

    Args:
        directory: the output directory; it need not exist.
        readers: name of a result -> function that reads it, and raises ValueError for a file of somebody else.
        pictures: names of its plots, without suffix.

    Raises:
        ValueError: a file with the name of a result is not a result, or a directory has the name of a file.
    """
    check_pages(directory, REPORT, "report.md", pictures)
    check_readable(directory, readers)


def check_readable(directory: Path, readers: Mapping[str, Callable[[Path], object]]) -> None:
    """Checks that files with the names of results are results; see `check_reused`.

    Raises:
        ValueError: one is not, or a directory has the name of a file.
    """
    check_names(directory)
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name in readers:
            try:
                readers[path.name](path)
            except ValueError as error:
                raise ValueError(
                    f"output: expected a directory without {path.name}, or with that of an earlier run, got "
                    f"{str(path)!r}: {one_line(error)}; move it, or name another --output"
                ) from error


def _is_ours(journal: Path) -> bool:
    ours = (RESULTS, MANIFEST, LOCK)
    return journal.is_dir() and all(
        path.name in ours or _KEPT.fullmatch(path.name) or is_temporary(path) for path in journal.iterdir()
    )


def make_writable(directory: Path) -> list[Path]:
    """Creates the journal's directory and tests that a file can be written there.

    Returns:
        The directories that were created, innermost first.

    Raises:
        ValueError: the directory cannot be created or written; gives the reason. Created directories are removed.
    """
    journal = directory / JOURNAL
    made: list[Path] = []
    try:
        for path in reversed([journal, *journal.parents]):
            if not path.is_dir():
                path.mkdir()
                made.insert(0, path)
        probe = journal / f".{'probe':_<48}.json.{secrets.token_hex(4)}"  # as long as the names of results
        try:
            with probe.open("xb") as file:
                file.write(b"\0")
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        remove_empty(made)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"output: expected a directory that can be written, got {str(directory)!r}: {why}") from error
    return made


def remove_empty(directories: list[Path]) -> None:
    """Removes directories in this order, up to the first that is not empty."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def check_space(directory: Path, needed: int) -> None:
    """Checks the free space of a file system.

    Raises:
        ValueError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"output: expected at least {needed / 1e6:,.1f} MB free for the results in {str(directory)!r}, got "
            f"{free / 1e6:,.1f} MB"
        )


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of a temporary file of hf_cod."""
    return _LEFT.fullmatch(path.name) is not None


def leftovers(directory: Path) -> list[Path]:
    """Temporary files of killed runs in a directory and its journal, and temporary directories next to it."""
    found = [path for path in (directory, directory / JOURNAL) if path.is_dir()]
    files = [path for folder in found for path in folder.iterdir() if is_temporary(path) and path.is_file()]
    beside = re.compile(rf"\.{re.escape(directory.name)}-[a-z0-9_]{{8}}")
    try:
        near = [path for path in directory.parent.iterdir() if beside.fullmatch(path.name) and _is_old_model(path)]
    except OSError:  # the parent may be entered, but not listed
        near = []
    return [*files, *near]


def _is_old_model(path: Path) -> bool:
    """Whether a directory holds only files of a checkpoint and is over an hour old (a younger one may be in use)."""
    if not path.is_dir() or path.is_symlink():
        return False
    inside = list(path.iterdir())
    known = all(p.is_file() and p.suffix in _OF_MODELS for p in inside)
    newest = max((p.stat().st_mtime for p in (path, *inside)), default=0.0)
    return known and time.time() - newest > _HOUR
