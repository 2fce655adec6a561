"""One writer in a directory at a time."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

# Directory -> the thread of this process that holds it, and how often: a command holds what a function that it calls
# holds, too.
_held: dict[str, tuple[int, int]] = {}


class DirectoryLock:
    """A lock on a directory, which ends with its process.

    Args:
        file: the lock's file; its directory exists.
        directory: what errors name.
    """

    def __init__(self, file: Path, directory: Path) -> None:
        self.file, self._directory = file, directory
        self._key = str(file.resolve())
        self._lock: FileLock | None = None
        self._identity: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Takes the lock at once, or not at all.

        Raises:
            ValueError: another command writes there.
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
            except NotImplementedError:  # a file system without locks: go without
                self.file.touch()
                return None
            if self.file.exists():
                return lock
            lock.release()  # its last holder has removed the file in between: nobody else would see this lock

    def _refusal(self) -> ValueError:
        return ValueError(
            f"output: expected a directory that no other command writes to, got {str(self._directory)!r}, where one "
            "is at work"
        )

    def _found(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.file)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def is_there(self) -> bool:
        """Whether its file still is the one that was locked: it goes with a directory that somebody deletes."""
        return self._identity is not None and self._found() == self._identity

    def release(self) -> bool:
        """Gives the lock back and removes its file; returns whether this was the outermost holder."""
        owner, depth = _held[self._key]
        if depth > 1:
            _held[self._key] = (owner, depth - 1)
            return False
        if self.is_there:
            with suppress(OSError):  # where an open file cannot be removed
                self.file.unlink()
        del _held[self._key]
        if self._lock is not None:
            self._lock.release()
        return True
