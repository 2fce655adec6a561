"""The directory that a command writes to: proved before the work, locked during it, complete or untouched afterwards.

While a command works, results are written to a directory inside the journal. `OutputDirectory.finish` lists them in a
manifest and moves them into their place; a command that is killed in between is completed by its next start. An error
removes what is half done and keeps the journal, from which the same command resumes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_cod.io.directory_lock import DirectoryLock
from hf_cod.io.output_checks import LOCK, check_place, check_space, leftovers, make_writable, remove_empty
from hf_cod.io.output_manifest import JOURNAL, RESULTS, Manifest, remove

_WRITING = tuple(getattr(errno, name, -1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO"))
# The same from libraries that have no errno: safetensors ("os error 28"), torch's writer of archives.
_TOLD = (*(f"os error {number})" for number in _WRITING), "PytorchStreamWriter", "inline_container", "No space left")


class OutputError(OSError):
    """Results could not be written; the message says where, why, and what is kept."""


class OutputDirectory:
    """A directory for one command at a time, as a context manager.

    Args:
        path: the directory, which need not exist.
        run: what tells this run from others, JSON-like: a killed run of the same is completed, and of another one
            refused. None: whatever was about to be moved is moved first.
        check: raises ValueError where the directory holds what the command must not touch.
        source: the model's directory or name, which must be another one.
        half: paths in the directory that a killed run left half written.

    Attributes:
        journal: the directory for what is kept for a resumed run.
        completed: whether a killed run had all but finished, and now has.

    Raises:
        ValueError: on entering; the directory cannot be written, holds something else, or another command is at work.
        OutputError: on leaving; a disk that is full, a directory that was deleted.
    """

    def __init__(
        self,
        path: str | Path,
        run: Any = None,
        *,
        check: Callable[[Path], object] | None = None,
        source: str | None = None,
        half: Callable[[Path], Iterable[Path]] | None = None,
    ) -> None:
        self.path = Path(path)
        self.journal = self.path / JOURNAL
        self.completed = False
        self._run = json.loads(json.dumps(run))
        self._check, self._source, self._half = check, source, half
        self._lock: DirectoryLock | None = None
        self._made: list[Path] = []

    def __enter__(self) -> OutputDirectory:
        self._look()  # nothing is written where this fails
        self._made = make_writable(self.path)
        try:
            self._lock = DirectoryLock(self.journal / LOCK, self.path)
            self._lock.acquire()
        except BaseException:
            self._lock = None
            remove_empty(self._made)
            raise
        try:
            left = self._look()  # another command may have been at work until now
            if left is not None:
                self._complete(left)
            self._clear()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _look(self) -> Manifest | None:
        """The manifest of a run that was killed while it finished; where there is none, the directory is checked."""
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
        """Moves what a killed run had not moved; where some of it is lost, that run's work is done again."""
        if left.complete(self.path):
            left.withdraw(self.path)
            return
        left.close(self.path)
        self.completed = self._run is not None

    def _clear(self) -> None:
        """Removes what killed runs left half written."""
        for path in [*leftovers(self.path), *(self._half(self.path) if self._half else ())]:
            remove(path)
        if Manifest.of(self.path) is None:
            remove(self.results)

    @property
    def results(self) -> Path:
        """Where results are written until `finish`."""
        return self.journal / RESULTS

    def journaled(self) -> list[str]:
        """Names, in the directory, of what is kept for a resumed run: spent when the run is finished."""
        return [f"{JOURNAL}/{path.name}" for path in self.journal.iterdir() if path.is_file() and path.name != LOCK]

    def require(self, needed: int) -> None:
        """Makes sure that the disk has room for the results.

        Raises:
            ValueError: it has less than `needed` bytes.
        """
        check_space(self.path, needed)

    def finish(self, spent: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
        """Moves the results into their place, and counts them.

        The directory itself stays: it may be a link, a mount point, or the one that somebody stands in.

        Args:
            spent: names of checkpoints in the directory, and of files in its journal, that are not needed any more.
            beside: names of files that the command has written into the directory itself, and that must be there.

        Raises:
            OutputError: the directory was deleted, or files are missing.
        """
        self._check_there(beside)
        manifest = Manifest.of_results(self.path, self._run, spent)
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
                f"output: expected {str(self.path)!r} to stay as it was, got {what} deleted while the command worked; "
                "results are lost, the same command makes them again"
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
            pass  # what was raised first is what is reported
        if lock.release() and there:
            remove_empty([self.journal, *self._made[1:]] if error is not None else [self.journal])
        if isinstance(error, Exception):
            self._explain(error, there)

    def _explain(self, error: Exception, there: bool) -> None:
        """Raises what stopped the command, where that is the disk or the directory."""
        if isinstance(error, OutputError):
            return
        if not there and not isinstance(error, ImportError):
            raise OutputError(
                f"output: expected {str(self.path)!r} to stay as it was, got the directory deleted while the command "
                "worked; results are lost, the same command makes them again"
            ) from error
        told = _of_writing(error)
        if told is None:
            return
        kept = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        resume = f"kept for the same command to resume: {', '.join(kept[:5])}" if kept else "nothing is kept"
        raise OutputError(f"output: expected {str(self.path)!r} to be written, got: {told}; {resume}") from error


def _of_writing(error: BaseException | None) -> str | None:
    """What a failed write says of itself, be it the cause of another error; None of other errors."""
    while error is not None:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if (isinstance(error, OSError) and error.errno in _WRITING) or any(text in str(error) for text in _TOLD):
            return said
        error = error.__cause__ or error.__context__
    return None
