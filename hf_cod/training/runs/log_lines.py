"""A training's log where no progress bar stands: one line a record, with the time left."""

from __future__ import annotations

import time
from typing import Any

from hf_cod.io.report import format_number
from hf_cod.layers.bitsandbytes_advice import advice_silenced

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import TrainerCallback


class LogLines(TrainerCallback):
    """Prints step, loss and time left of each record, each on a line of its own, which a file or a pipe keeps."""

    def __init__(self) -> None:
        self._begun, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Notes where a training, or the rest of one, begins."""
        self._begun, self._first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **about: Any) -> None:
        """One line; of what Trainer logs at the very end nothing, which the report has."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        done = max(1, state.global_step - self._first)
        seconds = (time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step)
        loss = format_number(float(logs["loss"]))
        print(f"step {state.global_step} of {state.max_steps}: loss {loss}, {duration(seconds)} left", flush=True)


def duration(seconds: float) -> str:
    """As people say it, in the two largest units: "2 h 5 min", "40 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
