"""A training's progress: a bar on a terminal, else lines (first step, records, each half minute) with the time left."""

from __future__ import annotations

import time
from typing import Any

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.report import format_number
from hf_cod.layers.running import INTERVAL

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import ProgressCallback, TrainerCallback


class TrainingBar(ProgressCallback):
    """Trainer's progress bar; it disappears when the training is finished, as all bars of this package do."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Shows the bar."""
        super().on_train_begin(args, state, control, **about)
        if self.training_bar is not None:
            self.training_bar.leave = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **about: Any) -> None:
        """Prints step and loss above the bar, in place of Trainer's dictionary."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(f"{_step(state)}: {_loss(logs)}")


class LogLines(TrainerCallback):
    """Prints step, loss and time left of each record as a separate line, for files and pipes."""

    def __init__(self) -> None:
        self._begun, self._printed, self._first = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Notes the time and the first step; says how many steps there are, and whether the training resumes."""
        self._begun, self._first = time.perf_counter(), state.global_step
        self._printed = self._begun
        if state.is_world_process_zero:
            resumed = f"resuming after {_step(state)}"
            print(resumed if state.global_step else f"training for {state.max_steps} steps", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Prints the time left after the first step, and if half a minute passed without a line."""
        late = time.perf_counter() - self._printed >= INTERVAL
        if (late or state.global_step == self._first + 1) and not control.should_log:
            self._print(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **about: Any) -> None:
        """Prints one line; the summary that Trainer logs at the end is left to the report."""
        if logs and "loss" in logs:
            self._print(state, f"{_loss(logs)}, ")

    def _print(self, state: Any, loss: str = "") -> None:
        if state.is_world_process_zero:
            print(f"{_step(state)}: {loss}{self._left(state)} left", flush=True)
            self._printed = time.perf_counter()

    def _left(self, state: Any) -> str:
        """The time of the remaining steps, if each takes as long as those before."""
        done = max(1, state.global_step - self._first)
        return duration((time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step))


def _step(state: Any) -> str:
    return f"step {state.global_step} of {state.max_steps}"


def _loss(logs: dict[str, Any]) -> str:
    return f"loss {format_number(float(logs['loss']))}"


class LastRecord(TrainerCallback):
    """Logs the loss of the last step too, so that each run has a curve, however short it is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Asks for a record after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True


def duration(seconds: float) -> str:
    """Seconds in the two largest units, such as "2 h 5 min" or "40 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
