"""MemoryCallback: what a step of Trainer needs in memory.

Not imported with the package, because transformers' Trainer takes longer to import than all of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_cod.finetuning.memory import LiveStorages, Memory, gradients_counted, state_of


class MemoryCallback(TrainerCallback):
    """Counts the second step that a run makes: the first one whose optimizer had its state from the beginning.

    Args:
        beside: other models in memory, whose weights count as weights.

    Attributes:
        memory: None until then.
    """

    def __init__(self, beside: Sequence[nn.Module] = ()) -> None:
        self._beside = beside
        self.memory: Memory | None = None
        self._steps = 0
        self._counter: LiveStorages | None = None
        self._attached = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Begins to count, if it is the second step."""
        self._steps += 1
        if self._steps != 2:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of what was measured before the training
        model, optimizer = about["model"], about["optimizer"]
        counter = LiveStorages(getattr(model.config, "vocab_size", None))
        for each in (model, *self._beside):
            counter.add([*each.parameters(), *each.buffers()], "weights")
        counter.add(state_of(optimizer), "optimizer state")
        self._attached.enter_context(gradients_counted(model, counter))
        self._attached.enter_context(counter)
        self._counter = counter

    def on_pre_optimizer_step(self, *args: Any, **about: Any) -> None:
        """What comes now is for the update."""
        if self._counter is not None:
            self._counter.phase = "update"

    def on_step_end(self, *args: Any, **about: Any) -> None:
        """Ends counting."""
        self.close()
        if self._counter is not None:
            self.memory, self._counter = self._counter.memory(), None

    def close(self) -> None:
        """Takes away what counts; to be called behind a training, too, which may have ended within a step."""
        self._attached.close()

    def bytes_used(self) -> int | None:
        """Peak of the training on the current CUDA device, as its allocator tells; elsewhere of the step that was
        counted, if there was one.
        """
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        return None if self.memory is None else self.memory.total
