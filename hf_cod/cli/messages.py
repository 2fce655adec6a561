"""Warnings of a command: on standard error, on lines of their own above the progress bar that stands there."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hf_cod.io.display import HarmlessFormatter

# Logs that scores, a plan or statistics are of a model of another name: once for the scores, again for a plan of them.
_OTHER_MODELS = "hf_cod.layers.checks"


@contextmanager
def warnings_shown(command: str) -> Iterator[None]:
    """Prints what this package logs as warnings within the block, as `hf-cod COMMAND: warning: ...`.

    So it does with old names of options, a warning of Python's. Another one of those says nothing to a user: PEFT asks
    transformers by an older name.
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
    """Shows one of Python's warnings."""
    if str(message).startswith("option: "):
        logger.warning(str(message))
    else:
        others(message, category, *where)


class _AboveBars(logging.Handler):
    """Writes where no bar stands, and of the same other model once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        from tqdm import tqdm

        models = record.getMessage().partition(": ")[2]  # behind the name of the field
        if record.name == _OTHER_MODELS and models in self._told:
            return
        self._told.add(models)
        tqdm.write(self.format(record), file=sys.stderr)
