"""Lock of a directory: one writer at a time."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

# Lock file -> (thread of this process that holds it, depth). The lock is reentrant: a command and a function that it
# calls may both hold it.
_held: dict[str, tuple[int, int]] = {}


class DirectoryLock:
    """A reentrant lock on a directory, released at the latest when its process ends.

    Args:
        file: the lock file; its directory must exist.
        directory: the directory that error messages name.
    """

    def __init__(self, file: Path, directory: Path) -> None:
        self.file, self._directory = file, directory
        self._key = str(file.resolve())
        self._lock: FileLock | None = None
        self._identity: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Acquires the lock without waiting.

        Raises:
            ValueError: another command writes to the directory.
        """
        mine = threading.get_ident()
        owner, depth = _held.get(self._key, (mine, 0))
        if owner != mine:
            raise self._refusal()
        if not depth:
            self._lock = self._take()
        _held[self._key] = (mine, depth + 1)
        self._identity = self._found()

    def _take(self) -> FileLock | None:
        while True:
            lock = FileLock(self.file)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise self._refusal() from None
            except NotImplementedError:  # a file system without locks: continue without one
                self.file.touch()
                return None
            if self.file.exists():
                return lock
            lock.release()  # the previous holder removed the file meanwhile: other processes would not see this lock

    def _refusal(self) -> ValueError:
        return ValueError(
            f"output: expected a directory that no other command writes to, got {str(self._directory)!r}, where one "
            "is running"
        )

    def _found(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.file)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def is_there(self) -> bool:
        """Whether the lock file is still the one that was locked; False after the directory was deleted."""
        return self._identity is not None and self._found() == self._identity

    def release(self) -> bool:
        """Releases the lock and removes its file; returns whether this was the outermost holder."""
        owner, depth = _held[self._key]
        if depth > 1:
            _held[self._key] = (owner, depth - 1)
            return False
        if self.is_there:
            with suppress(OSError):  # on systems where an open file cannot be removed
                self.file.unlink()
        del _held[self._key]
        if self._lock is not None:
            self._lock.release()
        return True
