"""SaveOnInterrupt: Ctrl-C ends a training with a checkpoint.

Not imported with the package, because transformers' Trainer takes longer to import than all of ours.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers.trainer_callback import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C lets the step end and saves; a second one ends at once.

    For a training in one process and in its main thread, which alone may handle signals; others are left as they are.

    Attributes:
        asked: whether the training was ended so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, *others: Any, **about: Any) -> None:
        """Takes the signal over."""
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Ends and saves, if that was asked for; the loss is logged, because a resumed training forgets it."""
        if self.asked:
            control.should_log = control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Gives the signal back; to be called behind a training, however it ended."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, *_: Any) -> None:
        self.asked = True
        self.close()
        print("\nstops and saves behind this step; Ctrl-C again: at once", file=sys.stderr, flush=True)
