"""The manifest of a command's results: the files that are about to be moved to the output directory, with sizes.

It is written in the journal once all results are on disk, and removed when all are in their final places. If a command
is killed during the move, its next start reads the manifest and moves the remaining files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_cod.io.display import one_line
from hf_cod.io.files import follow_umask, sync, sync_names, write_json
from hf_cod.io.reading import read_json, take_format
from hf_cod.io.schema import limits, read_record

JOURNAL = "journal"  # in an output directory: files from which an interrupted command resumes
MANIFEST, RESULTS = "manifest.json", "result"  # in the journal
# Moved last: other programs take a report as the sign of a finished run, and a config as the sign of a model.
_LAST = ("report.md", "report.json", "adapter_config.json", "config.json")
_SPENT = re.compile(rf"checkpoint-\d+|{JOURNAL}/[\w-][\w.-]*")


@dataclass(frozen=True)
class Manifest:
    """Results of one command that are to be moved.

    Attributes:
        run: JSON-like identity of the run.
        files: name of a file in the output directory -> size in bytes.
        spent: names of checkpoints there, and of files in the journal, to remove after the move.
    """

    run: Any
    files: dict[str, int] = field(metadata=limits(least=0))
    spent: list[str] = field(default_factory=list)

    @classmethod
    def of_results(cls, directory: Path, run: Any, spent: Sequence[str]) -> Manifest:
        """Fsyncs all files in the results directory and writes their manifest."""
        results = directory / JOURNAL / RESULTS
        follow_umask(results)
        sync(results)
        made = cls(run, {name: (results / name).stat().st_size for name in _names(results)}, list(spent))
        content = {"format": 1, "run": run, "files": made.files, "spent": made.spent}
        write_json(directory / JOURNAL / MANIFEST, content)
        return made

    @classmethod
    def of(cls, directory: Path) -> Manifest | None:
        """The manifest that a killed command left, or None.

        Raises:
            ValueError: the file is not a manifest of hf_cod.
        """
        file = directory / JOURNAL / MANIFEST
        if not file.is_file():
            return None
        try:
            found = read_record(cls, take_format(read_json(file, "manifest"), 1, "manifest"), "manifest")
        except ValueError as error:
            raise ValueError(f"output: expected a manifest of hf_cod, got {str(file)!r}: {one_line(error)}") from error
        if not _are_inside(found.files, found.spent):
            raise ValueError(f"output: expected a manifest of hf_cod, got {str(file)!r}")
        unlisted = sorted({*_names(directory / JOURNAL / RESULTS)} - found.files.keys())
        if unlisted:
            raise ValueError(f"output: expected a manifest of hf_cod, got {str(file)!r} without {unlisted[0]}")
        return found

    def complete(self, directory: Path) -> list[str]:
        """Moves the remaining files; returns the names of files that are missing or of another size.

        If any are, nothing is moved.
        """
        results = directory / JOURNAL / RESULTS
        lost = [
            name for name in self._order() if not (self._is_there(results, name) or self._is_there(directory, name))
        ]
        if lost:
            return lost
        for name in self._order():
            if (results / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(results / name, directory / name)
        sync_names(directory)
        return [name for name in self._order() if not self._is_there(directory, name)]

    def close(self, directory: Path) -> None:
        """Removes the spent files, then the manifest."""
        for name in self.spent:
            remove(directory / name)
        shutil.rmtree(directory / JOURNAL / RESULTS, ignore_errors=True)
        (directory / JOURNAL / MANIFEST).unlink()

    def withdraw(self, directory: Path) -> None:
        """Removes moved files if others are lost: the command starts again, or resumes from its journal."""
        for name in self._order():
            if self._is_there(directory, name):
                (directory / name).unlink()
        (directory / JOURNAL / MANIFEST).unlink(missing_ok=True)

    def _order(self) -> list[str]:
        return sorted(self.files, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name))

    def _is_there(self, directory: Path, name: str) -> bool:
        return (directory / name).is_file() and (directory / name).stat().st_size == self.files[name]


def _names(results: Path) -> list[str]:
    """Names of all files in the results directory, which need not exist."""
    return sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file())


def remove(path: Path) -> None:
    """Removes a file or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _are_inside(files: dict[str, int], spent: list[str]) -> bool:
    """Whether these are names of files inside a directory, and names of checkpoints or journal files."""
    paths = map(PurePosixPath, files)
    return not any(path.is_absolute() or ".." in path.parts for path in paths) and all(map(_SPENT.fullmatch, spent))
