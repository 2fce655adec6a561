"""Warnings of a command on standard error, on separate lines above the current progress bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hf_cod.io.display import HarmlessFormatter, one_line

# Its warnings say that scores, a plan or statistics belong to another model: once for the scores, again for the plan.
_OTHER_MODELS = "hf_cod.layers.checks"


@contextmanager
def warnings_shown(command: str) -> Iterator[None]:
    """Prints warnings that hf_cod logs within the block as `hf-cod COMMAND: warning: ...`.

    DeprecationWarnings about old option names are printed in the same way. A FutureWarning that PEFT triggers in
    transformers is hidden, since it does not concern users.
    """
    logger, handler = logging.getLogger("hf_cod"), _AboveBars(logging.WARNING)
    handler.setFormatter(HarmlessFormatter(f"hf-cod {command}: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("always", "option: ", DeprecationWarning)
            warnings.showwarning = partial(_show, warnings.showwarning, logger)
            yield
    finally:
        logger.removeHandler(handler)


def _show(others: Callable[..., None], logger: logging.Logger, message: Any, category: Any, *where: Any) -> None:
    """Logs a warning about an option; passes other Python warnings on, as one line without control characters."""
    if str(message).startswith("option: "):
        logger.warning(str(message))
    else:
        others(one_line(str(message)), category, *where)


class _AboveBars(logging.Handler):
    """Log handler that writes above progress bars; the same warning, or one about the same other model, only once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        from tqdm import tqdm

        message = record.getMessage()
        # The estimate of a training's memory prepares the method on a copy without weights, which warns, too.
        told = message.partition(": ")[2] if record.name == _OTHER_MODELS else message  # without the field name
        if told in self._told:
            return
        self._told.add(told)
        tqdm.write(self.format(record), file=sys.stderr)
