"""SIGTERM, the signal of `kill`, `timeout` and schedulers such as SLURM, as an exception like that of Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def interruption_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that an error is, or that made an import fail; None for other errors.

    An extension module that is interrupted while it is imported raises an ImportError from it. Any other error after an
    interruption, such as that of a disk that is full, is one of its own.
    """
    seen: BaseException | None = error
    while isinstance(seen, ImportError):
        seen = seen.__cause__ or seen.__context__
    return seen if isinstance(seen, KeyboardInterrupt) else None


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises Terminated in the block on the first SIGTERM, so that temporary files are removed; a second one ends it.

    Does nothing outside of the main thread, the only one that can handle signals, or if the signal has a handler.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
