"""Files and directories that survive an interruption: written aside, flushed, renamed; and the journal of a long run.

Whatever this package writes goes through here, and a command's results through `output_directory.py`.
`models/checkpoint.py` alone does the same for itself, because models/ imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

from hf_cod.io.reading import naming_file, parse_json, read_json, take_format
from hf_cod.io.schema import brief, check_value, read_record

logger = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound="JsonFile")
_BINARY = getattr(os, "O_BINARY", 0)  # of Windows, where text is the default


def write_aside(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Calls `write(file)` on a temporary binary file beside `path`, which takes that name only once it is on disk.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    path = Path(path)
    aside = _beside(path, ".")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose files their owner alone may read: here the umask decides.
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        _name(error, path, aside)
        raise
    return path


@contextmanager
def directory_aside(path: str | Path) -> Iterator[Path]:
    """A new directory beside `path` to fill; behind the block it takes that name, once all its files are on disk.

    Raises:
        OSError: there is something of that name already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(path, "-")
    aside.mkdir()
    try:
        yield aside
        sync(aside)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _beside(path: Path, joint: str) -> Path:
    """A name that nobody has, beside `path`."""
    return path.with_name(f".{path.name}{joint}{secrets.token_hex(4)}")


def _name(error: BaseException, path: Path, aside: Path | None = None) -> None:
    """Adds the path to an error of a write, which names no file by itself, or the temporary one."""
    if isinstance(error, OSError) and error.filename in (None, str(aside)) and error.errno is not None:
        error.filename = str(path)


def sync(directory: str | Path) -> None:
    """Returns once all files in a directory are on disk."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def follow_umask(directory: str | Path) -> None:
    """Gives all files in a directory the mode that a new one gets: safetensors writes for their owner alone.

    The umask itself cannot be read without changing it for other threads.
    """
    new = _beside(Path(directory) / "mode", ".")
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in Path(directory).rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sync_names(directory: str | Path) -> None:
    """Returns once the names in a directory are on disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` as UTF-8, aside and renamed."""
    return write_aside(path, lambda file: file.write(text.encode()))


def copy_aside(source: str | Path, path: str | Path) -> Path:
    """Copies a file's contents, aside and renamed."""
    with Path(source).open("rb") as original:
        return write_aside(path, lambda file: shutil.copyfileobj(original, file))


def append_line(path: str | Path, line: str) -> None:
    """Adds one line to a file, which is made if need be; it is on disk when this returns."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _name(error, path)
        raise


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as strict JSON (no NaN), aside and renamed."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class JsonFile:
    """Mixin of a dataclass that is kept as one JSON file.

    Attributes:
        FIELD: what errors call such a file.
        FORMAT: the version that is written, and the only one that is read.
        RENAMED: name of an entry in earlier files -> its name now.
        RENAMED_VALUES: name of an entry -> its values in earlier files -> what they are called now.
    """

    FIELD: ClassVar[str]
    FORMAT: ClassVar[int] = 1
    RENAMED: ClassVar[Mapping[str, str]] = {}
    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[Any, Any]]] = {}

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file; returns its path."""
        return write_json(path, {"format": self.FORMAT, **asdict(cast(Any, self))})

    @classmethod
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Reads what `save` wrote; what earlier files lack has a default.

        Raises:
            ValueError: no such file, of another format, or with entries that the fields do not allow (`schema.py`).
        """
        content = read_json(path, cls.FIELD)
        with naming_file(path):
            entries = take_format(content, cls.FORMAT, cls.FIELD)
            old = {name: new for name, new in cls.RENAMED.items() if new not in entries}
            entries = {old.get(name, name): value for name, value in entries.items()}
            for name, values in cls.RENAMED_VALUES.items():
                if isinstance(entries.get(name), str):
                    entries[name] = values.get(entries[name], entries[name])
            read = read_record(cls, entries, cls.FIELD)
            read.check_read()
        return read

    def check_read(self) -> None:
        """Makes sure of what the types of the fields cannot tell; called on what was read.

        Raises:
            ValueError: "field: expected ..., got ...".
        """


def reason(error: Exception) -> str:
    """Why a file could not be read, in words; an error of the operating system without its number."""
    return str(error.strerror or error).lower() if isinstance(error, OSError) else str(error)


def check_file(field: str, path: str | Path) -> None:
    """Makes sure that a file of that name can be written or read.

    Raises:
        ValueError: a directory has it.
    """
    if Path(path).is_dir():
        raise ValueError(f"{field}: expected a file, got the directory {str(path)!r}")


def looks_local(name: str) -> bool:
    """Whether a name can only mean a path: a Hub id has at most one slash and starts with neither ".", "/" nor "~"."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-like values: equal work has an equal fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Journal:
    """Results of a long run, one JSON line each, so that an interrupted run goes on where it stopped.

    Each line names the work that it belongs to, and ends with a checksum. Lines of other work in the same file are
    kept, but not read; a line that was cut off in the middle of writing is dropped, and so is a damaged one, which a
    warning says. Lines of earlier versions, which have no checksum, are taken as they are. Without a path the journal
    lives in memory alone.

    Args:
        path: the file, or None.
        work: what `fingerprint` gave for this work's inputs and settings.
    """

    def __init__(self, path: str | Path | None, work: str) -> None:
        self.path = Path(path) if path is not None else None
        self.work = work
        self.entries: dict[str, Any] = {}
        if self.path is not None:
            check_file("journal", self.path)
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole = []
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines):
            with naming_file(path):
                record = _record_of(line)
            if record is None:
                if number < len(lines) - 1:  # else the empty tail, or a line that the interruption cut
                    logger.warning("a line of %s is damaged: what it held is done again", path)
                continue
            whole.append(line)
            work, key, value = record
            if work == self.work:
                self.entries[key] = value
        if [*whole, ""] != lines:
            write_text(path, "".join(f"{line}\n" for line in whole))

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def get(self, key: str) -> Any:
        """The result, or None where it is not known."""
        return self.entries.get(key)

    def result(self, key: str, kind: Any) -> Any:
        """The result, of which an annotation says what it has to be, as `schema.check_value` understands it.

        Raises:
            ValueError: the file holds something else.
        """
        with naming_file(self.path or "memory"):
            return check_value(self.entries[key], kind, f"journal {brief(key)}", {"nan": True})

    def add(self, key: str, value: Any) -> None:
        """Records one result; it is on disk when this returns."""
        self.entries[key] = value
        if self.path is None:
            return
        record = json.dumps([self.work, key, value])
        append_line(self.path, f'{record[:-1]}, "{_checksum(record)}"]')


def _record_of(line: str) -> tuple[str, str, Any] | None:
    """(work, key, value) of a journal's line; None of a damaged one."""
    try:
        record = parse_json(line, "journal", nan=True)
    except ValueError:
        return None
    if isinstance(record, dict):  # no journal has such lines, and nobody else's file is written anew
        raise ValueError(f"journal: expected [work, key, result] in each line, got {brief(record)}")
    if not isinstance(record, list) or not all(isinstance(entry, str) for entry in record[:2]):
        return None
    if len(record) == 4:
        end = f', "{record[3]}"]'
        if not line.endswith(end) or _checksum(f"{line[: -len(end)]}]") != record[3]:
            return None
    return (record[0], record[1], record[2]) if len(record) in (3, 4) else None


def _checksum(record: str) -> str:
    return hashlib.sha256(record.encode()).hexdigest()[:16]
