"""Stops a training on a signal, with a checkpoint of its last step."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.interruption import Terminated

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Stops training on Ctrl-C or SIGTERM (the signal of `kill`, `timeout` and schedulers such as SLURM).

    The first signal completes the step and saves a checkpoint, a second one stops at once. Active only in a run of one
    process and in its main thread, the only one that can handle signals. An ignored signal (a background job of a
    script) is left unchanged, and so is one whose handler was not set by Python, because it could not be restored.

    Attributes:
        asked: the first signal that was received, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, *others: Any, **about: Any) -> None:
        """Installs the signal handlers if the conditions above hold."""
        if args.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Stops and saves after a signal; also logs the loss, because a resumed run does not have it."""
        if self.asked is not None:
            control.should_log = control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Restores the signal handlers; must be called after training, also after an exception."""
        while self._before:
            signal.signal(*self._before.popitem())

    def raise_asked(self) -> None:
        """Raises the exception of the signal, if one was received."""
        if self.asked is not None:
            raise Terminated if self.asked == signal.SIGTERM else KeyboardInterrupt

    def _ask(self, number: int, _: Any) -> None:
        self.asked = number
        self.close()
        print(
            "\nsaving a checkpoint after this step, then stopping; press Ctrl-C again to stop at once",
            file=sys.stderr,
            flush=True,
        )
