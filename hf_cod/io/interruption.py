"""Signals that stop a command, as exceptions: Ctrl-C, and SIGTERM (of `kill`, `timeout` and schedulers like SLURM)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Signal -> its handler in a process where none was set.
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


class Interruptions:
    """The signals of a block, see `raised`."""

    def __init__(self) -> None:
        self._first: KeyboardInterrupt | None = None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raises Terminated on the first SIGTERM, so that temporary files are removed; a second one ends the process.

        Ctrl-C raises KeyboardInterrupt, as usual. Does nothing outside of the main thread, the only one that can handle
        signals, nor for a signal that has a handler.
        """
        alone = threading.current_thread() is threading.main_thread()
        taken = [number for number, usual in _USUAL.items() if alone and signal.getsignal(number) is usual]
        for number in taken:
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, _USUAL[number])

    def behind(self, error: BaseException) -> KeyboardInterrupt | None:
        """The interruption that an error is, or that an extension module replaced by an error; None for other errors.

        Extension modules that are interrupted raise errors of their own: an ImportError from the interruption while
        they are imported, and an error without a trace of it from a conversion that calls Python. An error that was
        raised while the interruption was handled, such as that of a full disk, is another one.
        """
        seen: BaseException | None = error
        while isinstance(seen, ImportError):
            seen = seen.__cause__ or seen.__context__
        if isinstance(seen, KeyboardInterrupt):
            return seen
        while seen is not None:
            if isinstance(seen, KeyboardInterrupt):
                return None
            seen = seen.__cause__ or seen.__context__
        return self._first

    def _stop(self, number: int, _: Any) -> None:
        signal.signal(number, _USUAL[number])
        self._first = self._first or (Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise self._first
