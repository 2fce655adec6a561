"""A command on a changed file: what is read of a file, what is put in its place, and what is wrong with the outcome."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cli.read_files import Kind, call
from tests.io.mutations import Raw, text_of
from tests.test_same_bytes import contents

# Of hf_cod, and of the libraries that it calls.
WARNINGS = re.compile(r"^hf-cod \S+ warning: |Warning: |^  ")


def _path(kind: Kind, folder: Path) -> Path:
    return next(folder.glob(kind.file))


def read_whole(kind: Kind, folder: Path) -> Any:
    """What is changed of a file: its content, one entry of it, or all lines of it."""
    path = _path(kind, folder)
    if path.suffix == ".safetensors":
        raw = path.read_bytes()
        return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    content = json.loads(path.read_text())
    return content if kind.entry is None else content[kind.entry]


def write_changed(kind: Kind, folder: Path, raw: bytes) -> None:
    """Puts changed bytes in the place of what `read_whole` returned."""
    path = _path(kind, folder)
    if path.suffix == ".safetensors":
        whole = path.read_bytes()
        data = whole[8 + int.from_bytes(whole[:8], "little") :]
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    elif path.suffix == ".jsonl":
        opening, closing = (b"{", b"}") if kind.file == "history.jsonl" else (b"[", b"]")
        lines = raw.replace(closing + b", " + opening, closing + b"\n" + opening)
        path.write_bytes(lines.removeprefix(b"[").removesuffix(b"]") + b"\n")
    elif kind.entry is None:
        path.write_bytes(raw)
    else:
        content = json.loads(path.read_text())
        path.write_bytes(text_of({**content, kind.entry: Raw("@")}).encode().replace(b"@", raw, 1))


class Place:
    """A directory with the files that a command needs, which are whole again after each of its calls."""

    def __init__(self, kind: Kind, whole: Path, folder: Path) -> None:
        self.kind, self._folder, self._whole = kind, folder, whole
        words = {"model", "text.txt", Path(kind.file).parts[0], *kind.command.split()}
        self._names = [path.name for path in whole.iterdir() if path.name in words]
        self._restore()
        self.files = contents_of(folder)
        assert self.call() == 0
        self.expected = self._results()
        self._restore()

    def call(self) -> int:
        return call(self.kind.command)

    def complaint(self, raw: bytes, printed: Callable[[], str]) -> str | None:
        """What is wrong with the outcome of the command on a changed file; None: nothing."""
        write_changed(self.kind, self._folder, raw)
        before = contents_of(self._folder)
        printed()
        try:
            status = self.call()
            found = self._wrong(status, printed(), before)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error} in {where.filename}:{where.lineno}"
        finally:
            self._restore()
        return found

    def _wrong(self, status: int, errors: str, before: dict[str, bytes | bool]) -> str | None:
        if status == 0:
            other = [name for name, told in self._results().items() if told != self.expected[name]]
            return f"accepted, but {', '.join(other)} differs" if other else None
        lines = [line for line in errors.strip().splitlines() if not WARNINGS.search(line)]
        if status != 2 or len(lines) != 1 or not re.fullmatch(r"hf-cod \S+ error: \S.*: expected .*got .*", lines[0]):
            return f"status {status}: {errors}"
        after = contents_of(self._folder)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        return f"refused, but changed {', '.join(sorted(changed))}: {lines[0]}" if changed else None

    def _results(self) -> dict[str, Any]:
        return {name: contents(self._folder / name) for name in self.kind.results}

    def _restore(self) -> None:
        if contents_of(self._folder) == getattr(self, "files", None):
            return
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in self._names:
            path = self._whole / name
            shutil.copytree(path, self._folder / name) if path.is_dir() else shutil.copy(path, self._folder / name)


def contents_of(folder: Path) -> dict[str, bytes | bool]:
    """Path -> contents of each file, False for a directory."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@contextmanager
def called_from(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
