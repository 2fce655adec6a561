"""Journal of a long run: its finished results as JSON lines, from which an interrupted run resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cod.io.files import append_line, check_file, write_text
from hf_cod.io.reading import checksum, naming_file, parse_json, read_text
from hf_cod.io.schema import brief, check_value

logger = logging.getLogger(__name__)


class JournalError(ValueError):
    """A file in a journal holds what cannot be a result of this work. No fault of the work: it is not to be skipped."""


class Journal:
    """Results of a long run as JSON lines, from which an interrupted run resumes.

    Each line holds the fingerprint of its work and ends with a checksum. Lines of other work in the same file are
    kept, but not read. An incomplete last line is dropped; a damaged line is dropped with a warning. Lines of earlier
    versions, which have no checksum, are read without this check.

    Args:
        path: the file; None: the journal is kept in memory only.
        work: `fingerprint` of the inputs and settings of this work.
    """

    def __init__(self, path: str | Path | None, work: str) -> None:
        self.path = Path(path) if path is not None else None
        self.work = work
        self.entries: dict[str, Any] = {}
        if self.path is not None:
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole, lines = [], check_journal(path)
        for number, line in enumerate(lines):
            record = _record_of(line)
            if record is None:
                if number < len(lines) - 1:  # else the empty tail, or a line that the interruption cut
                    logger.warning("%s has a damaged line: its result is computed again", path)
                continue
            whole.append(line)
            work, key, value = record
            if work == self.work:
                self.entries[key] = value
        if lines and [*whole, ""] != lines:
            write_text(path, "".join(f"{line}\n" for line in whole))

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def get(self, key: str) -> Any:
        """The result, or None if there is none yet."""
        return self.entries.get(key)

    def result(self, key: str, kind: Any) -> Any:
        """The result, checked against a type annotation by `schema.check_value`.

        Raises:
            ValueError: the file holds a value of another type.
        """
        with naming_file(self.path or "memory"):
            return check_value(self.entries[key], kind, f"journal {brief(key)}", {"nan": True})

    def is_sound(self, key: str, check: Callable[[Any], object]) -> bool:
        """Whether there is a result that passes a check. One that does not counts as damaged: it is dropped with a
        warning, to be computed again.

        Args:
            key: the key of the result.
            check: raises ValueError for a value that cannot be this result.
        """
        if key not in self.entries:
            return False
        try:
            check(self.entries[key])
        except ValueError as error:
            where = self.path or "the journal"
            logger.warning("%s has a damaged result (%s): it is computed again", where, error)
            del self.entries[key]
            return False
        return True

    def add(self, key: str, value: Any) -> None:
        """Records one result and fsyncs it; a result that is recorded already is not written again."""
        known = self.path is not None and key in self.entries and json.dumps(self.entries[key]) == json.dumps(value)
        self.entries[key] = value
        if self.path is not None and not known:
            record = json.dumps([self.work, key, value])
            append_line(self.path, f'{record[:-1]}, "{checksum(record)}"]')


def check_journal(path: Path) -> list[str]:
    """The lines of a journal, also a damaged one; none if it does not exist. Files of other origin are refused.

    Raises:
        ValueError: it is a directory, a link that leads nowhere, larger than `reading.MOST_BYTES`, or a file in which
            no line has the form of a result.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"output: expected a journal of hf_cod, got {str(path)!r}, a broken link; remove it")
    check_file("journal", path)
    if not path.is_file():
        return []
    # On Windows, lines end with a carriage return, too.
    lines = read_text(path, "journal", errors="replace").replace("\r\n", "\n").split("\n")
    if any(lines) and not any(line.startswith('["') or line.endswith('"]') or line == "[" for line in lines):
        raise ValueError(
            f"journal: expected [work, key, result] in each line, got {str(path)!r}, in which no line has this form; "
            "move it, or name another directory"
        )
    return lines


def _record_of(line: str) -> tuple[str, str, Any] | None:
    """(work, key, value) of a journal line; None if the line is damaged."""
    try:
        record = parse_json(line, "journal", nan=True)
    except ValueError:
        return None
    if not isinstance(record, list) or not all(isinstance(entry, str) for entry in record[:2]):
        return None
    if len(record) == 4:
        end = f', "{record[3]}"]'
        if not line.endswith(end) or checksum(f"{line[: -len(end)]}]") != record[3]:
            return None
    return (record[0], record[1], record[2]) if len(record) in (3, 4) else None
