"""Atomic writes of files and directories (temporary name, fsync, rename), and the journal of a resumable run.

All files of this package are written with these functions; results of commands also go through `output_directory.py`.
Exception: `models/checkpoint.py` has an implementation of its own, because models/ imports no other folder of hf_cod.
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

from hf_cod.io.arguments import checked
from hf_cod.io.reading import naming_file, read_json, take_format
from hf_cod.io.schema import read_record

logger = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound="JsonFile")
_BINARY = getattr(os, "O_BINARY", 0)  # of Windows, where text is the default


def write_aside(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Calls `write(file)` on a temporary binary file next to `path`, fsyncs it, then renames it to `path`.

    Raises:
        OSError: the file cannot be written; names `path`.
    """
    path = Path(path)
    aside = _beside(path, ".")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile, whose files are readable by their owner only: here the umask applies.
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
    """Yields a new temporary directory next to `path`; after the block, fsyncs its files and renames it to `path`.

    On an exception the temporary directory is removed.

    Raises:
        OSError: `path` already exists.
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
    """A random, unused name next to `path`."""
    return path.with_name(f".{path.name}{joint}{secrets.token_hex(4)}")


def _name(error: BaseException, path: Path, aside: Path | None = None) -> None:
    """Adds the path to a write error that names no file, or only the temporary one."""
    if isinstance(error, OSError) and error.filename in (None, str(aside)) and error.errno is not None:
        error.filename = str(path)


def sync(directory: str | Path) -> None:
    """Fsyncs all files in a directory, recursively."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def follow_umask(directory: str | Path) -> None:
    """Sets the mode of all files in a directory to that of a newly created file.

    safetensors writes files that only their owner can read. The umask cannot be read without changing it for other
    threads, so the mode is taken from a temporary file.
    """
    new = _beside(Path(directory) / "mode", ".")
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in Path(directory).rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sync_names(directory: str | Path) -> None:
    """Fsyncs a directory, so that renames in it are on disk (POSIX only; does nothing elsewhere)."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` as UTF-8, atomically."""
    return write_aside(path, lambda file: file.write(text.encode()))


def copy_aside(source: str | Path, path: str | Path) -> Path:
    """Copies the contents of a file, atomically."""
    with Path(source).open("rb") as original:
        return write_aside(path, lambda file: shutil.copyfileobj(original, file))


def append_line(path: str | Path, line: str) -> None:
    """Appends one line to a file, which is created if missing, and fsyncs it.

    Raises:
        ValueError: the path is a link, through which the line would be written somewhere else.
    """
    path = Path(path)
    if path.is_symlink():
        raise ValueError(f"output: expected a file of hf_cod, got {str(path)!r}, a link; remove it")
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
    """Writes `value` as strict JSON (no NaN), atomically."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class JsonFile:
    """Mixin for a dataclass that is saved as one JSON file.

    Attributes:
        FIELD: the field name at the start of error messages about such a file.
        FORMAT: the format version that is written, and the only one that is read.
        RENAMED: name of an entry in earlier files -> its current name.
        RENAMED_VALUES: name of an entry -> value in earlier files -> current value.
    """

    FIELD: ClassVar[str]
    FORMAT: ClassVar[int] = 1
    RENAMED: ClassVar[Mapping[str, str]] = {}
    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[Any, Any]]] = {}

    @checked
    def save(self, path: str | Path) -> Path:
        """Writes the JSON file; returns its path. Raises ValueError for a directory."""
        check_file("path", path)
        return write_json(path, {"format": self.FORMAT, **asdict(cast(Any, self))})

    @classmethod
    @checked
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Reads a file that `save` wrote; entries missing in earlier files get their defaults.

        Raises:
            ValueError: no such file, another format version, or entries that the fields do not allow (`schema.py`).
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
        """Checks after reading what field types do not express; raises ValueError "field: expected ..., got ..."."""


def reason(error: Exception) -> str:
    """The reason why a file could not be read; for an error of the operating system, without its number."""
    return str(error.strerror or error).lower() if isinstance(error, OSError) else str(error)


def check_file(field: str, path: str | Path) -> None:
    """Checks that a path is not a directory.

    Raises:
        ValueError: it is one.
    """
    if Path(path).is_dir():
        raise ValueError(f"{field}: expected a file, got the directory {str(path)!r}")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a Hub id has at most one slash and starts with neither ".", "/" nor "~"."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def fingerprint(*parts: Any) -> str:
    """A short hash (16 hex digits) of JSON-like values; equal values have equal fingerprints."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
