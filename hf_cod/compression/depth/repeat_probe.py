"""Losses of a model that runs a block of its layers several times, for many blocks at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from hf_cod.analysis.evaluation.metrics import Metric, as_loss, check_rows
from hf_cod.analysis.evaluation.outputs import run_for_metric
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, reads_several_states
from hf_cod.layers.partial_forward import State, running_only
from hf_cod.layers.removal.repeat import repeated
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs

Block = tuple[int, int]
"""(start, end): layers start to end - 1."""
INTACT: Block = (0, 0)


class RepeatProbe:
    """Measures the losses with repeated blocks, all on the same batches.

    The layers up to the end of a block run once for all blocks; for each block only its repetitions and the layers
    after it run. Memory holds one hidden state beside those of the running layers.

    Args:
        stack: the layers.
        metric: from `find_metric`.
        times: how often a block runs.
        batches: dicts for the model's forward.
        journal: saves the rows of each (batch, block); saved rows are not computed again.
        show_progress: show progress bars.

    Raises:
        ValueError: layers that share keys and values.
    """

    def __init__(
        self,
        stack: DecoderLayers,
        metric: Metric,
        times: int,
        batches: Sequence[Batch],
        journal: Journal | None = None,
        show_progress: bool = False,
    ) -> None:
        check_independent(stack, "layers", batches)
        self._stack, self._metric, self._times, self._batches = stack, metric, times, batches
        self._journal, self._show = Journal(None, "") if journal is None else journal, show_progress
        self._whole = reads_several_states(stack, batches)
        self._device = execution_device(stack.model)

    @torch.no_grad()
    def losses(self, blocks: Sequence[Block], title: str = "blocks") -> list[float]:
        """The loss with each of these blocks repeated, `INTACT` for none: nats a token of a language model, else the
        metric's own (`as_loss`).

        Raises:
            ValueError: a loss that is not finite; says with which block.
        """
        with evaluation_mode(self._stack):
            for number, batch in enumerate(progress(self._batches, title, self._show)):
                sound = partial(check_rows, self._metric, batch=batch)
                left = [b for b in dict.fromkeys(blocks) if not self._journal.is_sound(self._key(number, b), sound)]
                for block, (outputs, read) in self._outputs(to_device(batch, self._device), left):
                    self._journal.add(self._key(number, block), self._metric.rows(outputs, read, None))
        return [self._loss(block) for block in blocks]

    def rows(self, block: Block) -> list[Any]:
        """The metric's row of each sample, of a block that was measured."""
        numbers = range(len(self._batches))
        return [row for number in numbers for row in self._journal.result(self._key(number, block), list[Any])]

    def _outputs(self, batch: Batch, blocks: Iterable[Block]) -> Iterator[tuple[Block, tuple[Any, Batch]]]:
        """Yields (block, what `run_for_metric` returns with it repeated), by the ends of the blocks.

        A block that starts at the first layer, which the model runs on its embeddings alone, runs in the whole model,
        as all blocks do if the model reads the states of several layers.
        """
        stack, inputs, state, done = self._stack, model_inputs(self._stack.model, batch), None, 0
        for start, end in sorted(blocks, key=lambda block: block[::-1]):
            if (start, end) == INTACT:
                yield INTACT, run_for_metric(stack, self._metric, batch)
                continue
            if start == 0 or self._whole:
                with repeated(stack.model, start, end, self._times, stack.layers_path):
                    yield (start, end), run_for_metric(stack, self._metric, batch)
                continue
            state, done = self._run(range(done, end), inputs, state), end
            again = state
            for _ in range(self._times - 1):
                again = self._run(range(start, end), inputs, again)
            with running_only(stack, range(end, len(stack)), again):
                yield (start, end), run_for_metric(stack, self._metric, batch)

    def _run(self, layers: range, inputs: dict[str, Any], state: State | None) -> State | None:
        """The state after these layers."""
        if not layers:
            return state
        with running_only(self._stack, layers, state) as outputs:
            self._stack.trunk(**inputs)
        return outputs[-1] if outputs else state

    def _key(self, batch: int, block: Block) -> str:
        return f"repeated {batch} {block[0]} {block[1]}"

    def _loss(self, block: Block) -> float:
        loss = as_loss(self._metric, self._metric.value(self.rows(block)))
        if not math.isfinite(loss):
            where = "of the intact model" if block == INTACT else f"with layers {block[0]} to {block[1] - 1} repeated"
            raise ValueError(f"model: expected a finite loss, got {loss} {where}")
        return loss
