"""Output directory of a command: checked before the run, locked during it, complete or unchanged after it.

During the run, results are written to a directory inside the journal. `OutputDirectory.finish` lists them in a
manifest and moves them to their final places; if the command is killed during the move, its next start completes it.
An error removes unfinished results and keeps the journal, from which the same command resumes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_cod.io.directory_lock import DirectoryLock
from hf_cod.io.display import first_line
from hf_cod.io.output_checks import LOCK, REPORT, check_place, check_space, leftovers, make_writable, remove_empty
from hf_cod.io.output_manifest import JOURNAL, RESULTS, Manifest, remove
from hf_cod.io.reading import as_read

_WRITING = tuple(getattr(errno, name, -1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO"))
# The same errors from libraries without errno: safetensors ("os error 28"), torch's archive writer.
_TOLD = (*(f"os error {number})" for number in _WRITING), "PytorchStreamWriter", "inline_container", "No space left")


class OutputError(OSError):
    """Results could not be written; the message gives the directory, the reason, and the files that are kept."""


class OutputDirectory:
    """Context manager for an output directory that one command uses at a time.

    Args:
        path: the directory; it need not exist.
        run: JSON-like identity of this run. If a run was killed while it moved its results, the move is completed for
            the same identity and refused for another one. None: the move is always completed first.
        check: raises ValueError if the directory holds files that the command must not touch.
        source: the model's directory or name; must not be the output directory.
        half: returns paths in the directory that a killed run left half written.
        lost: returns paths that this run wrote after the directory was deleted, and from which no run can resume.

    Attributes:
        journal: the directory of files for a resumed run.
        completed: whether entering completed the move of a killed run, so that no work is left.

    Raises:
        ValueError: on entering: the directory cannot be written, holds other files, or is in use by another command.
        OutputError: on leaving: the disk is full, or the directory was deleted.
    """

    def __init__(
        self,
        path: str | Path,
        run: Any = None,
        *,
        check: Callable[[Path], object] | None = None,
        source: str | None = None,
        half: Callable[[Path], Iterable[Path]] | None = None,
        lost: Callable[[Path], Iterable[Path]] | None = None,
    ) -> None:
        self.path = Path(path)
        self.journal = self.path / JOURNAL
        self.completed = False
        self._run = as_read(run)
        self._check, self._source, self._half, self._lost = check, source, half, lost
        self._lock: DirectoryLock | None = None
        self._made: list[Path] = []
        self._manifest: Manifest | None = None

    def __enter__(self) -> OutputDirectory:
        try:
            self._look()  # before anything is written
        except ValueError:
            self._remove_stale_journal()
            raise
        self._made = make_writable(self.path)
        try:
            self._lock = DirectoryLock(self.journal / LOCK, self.path)
            self._lock.acquire()
        except BaseException:
            self._lock = None
            remove_empty(self._made)
            raise
        try:
            left = self._look()  # again: another command may have changed the directory before the lock was acquired
            if left is not None:
                self._complete(left)
            self._clear()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _look(self) -> Manifest | None:
        """Returns the manifest of a run that was killed while it finished; if there is none, checks the directory."""
        check_place(self.path, self._source)
        left = Manifest.of(self.path)
        if left is None:
            if self._check is not None:
                self._check(self.path)
        elif self._run is not None and left.run != self._run:
            raise ValueError(
                f"output: expected a new directory, or that of the same run, got {str(self.path)!r}, where another run "
                "was killed while it finished; repeat its command, or name another --output"
            )
        return left

    def _complete(self, left: Manifest) -> None:
        """Completes the move of a killed run; if some of its results are lost, they are computed again."""
        if left.complete(self.path):
            left.withdraw(self.path)
            return
        left.close(self.path)
        self.completed = self._run is not None

    def _remove_stale_journal(self) -> None:
        """Removes the empty journal of a run that was killed after all results were in their final places.

        The directory is then that of a finished run, which a command may refuse before it acquires the lock.
        """
        with suppress(OSError, ValueError):  # no journal; or another command holds the lock
            left = {path.name for path in self.journal.iterdir()}
            if not (self.path / REPORT).is_file() or left - {LOCK}:
                return
            if left:
                lock = DirectoryLock(self.journal / LOCK, self.path)
                lock.acquire()
                lock.release()
            self.journal.rmdir()

    def _clear(self) -> None:
        """Removes files that killed runs left half written."""
        for path in [*leftovers(self.path), *(self._half(self.path) if self._half else ())]:
            remove(path)
        if Manifest.of(self.path) is None:
            remove(self.results)

    @property
    def results(self) -> Path:
        """The directory in which results are written until `finish`."""
        return self.journal / RESULTS

    def journaled(self) -> list[str]:
        """Names, relative to the directory, of journal files; not needed any more once the run is finished."""
        return [f"{JOURNAL}/{path.name}" for path in self.journal.iterdir() if path.is_file() and path.name != LOCK]

    def require(self, needed: int) -> None:
        """Checks that the disk has space for the results.

        Raises:
            ValueError: fewer than `needed` bytes are free.
        """
        check_space(self.path, needed)

    def finish(self, spent: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
        """Moves the results to their final places and verifies that all are there.

        The directory itself is not replaced: it may be a link, a mount point, or the current directory of a shell.

        Args:
            spent: names of checkpoints in the directory, and of files in its journal, that are not needed any more.
            beside: names of files that the command wrote directly into the directory, and that must exist.

        Raises:
            OutputError: the directory was deleted, or files are missing.
        """
        self._check_there(beside)
        self._manifest = manifest = Manifest.of_results(self.path, self._run, spent)
        missing = manifest.complete(self.path)
        self._check_there([*beside, *missing])
        if missing:
            raise OutputError(f"output: expected all results in {str(self.path)!r}, got none or a part of {missing[0]}")
        manifest.close(self.path)

    def _check_there(self, names: Sequence[str]) -> None:
        gone = self._lock is None or not self._lock.is_there
        missing = [name for name in names if not (self.path / name).is_file()]
        if gone or missing:
            what = "the directory" if gone else missing[0]
            raise OutputError(
                f"output: expected {str(self.path)!r} to remain during the run, got {what} deleted; results are lost, "
                "run the same command again"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        there, lock = self._lock.is_there, self._lock
        self._lock = None
        try:
            if error is not None and there:
                self._clear()
        except (OSError, ValueError):
            pass  # the first exception is the one to report
        if lock.release():
            if there:
                remove_empty([self.journal, *self._made[1:]] if error is not None else [self.journal])
            else:
                self._remove_lost()
        if isinstance(error, Exception):
            self._explain(error, there)

    def _remove_lost(self) -> None:
        """Removes what was written after the directory was deleted, unless another command uses it meanwhile."""
        lock = DirectoryLock(self.journal / LOCK, self.path)
        try:
            if not self.path.is_dir():
                return
            self.journal.mkdir(exist_ok=True)
            lock.acquire()
        except (OSError, ValueError):
            return
        try:
            if self._manifest is not None:
                self._manifest.withdraw(self.path)
            self._clear()
            for path in self._lost(self.path) if self._lost else ():
                remove(path)
        except (OSError, ValueError):
            pass  # the first exception is the one to report
        lock.release()
        remove_empty([self.journal, *self._made[1:]])

    def _explain(self, error: Exception, there: bool) -> None:
        """Raises an OutputError if the disk or the directory was the cause of an error."""
        if isinstance(error, OutputError):
            return
        if not there and not isinstance(error, ImportError):
            raise OutputError(
                f"output: expected {str(self.path)!r} to remain during the run, got the directory deleted; results are "
                "lost, run the same command again"
            ) from error
        told = _of_writing(error)
        if told is None:
            return
        kept = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        resume = f"kept for the same command to resume: {', '.join(kept[:5])}" if kept else "nothing is kept"
        raise OutputError(f"output: expected {str(self.path)!r} to be written, got: {told}; {resume}") from error


def _of_writing(error: BaseException | None) -> str | None:
    """The message of a failed write, also if it is the cause of another error; None for other errors."""
    while error is not None:
        said = first_line(error)
        if (isinstance(error, OSError) and error.errno in _WRITING) or any(text in str(error) for text in _TOLD):
            return said
        error = error.__cause__ or error.__context__
    return None
