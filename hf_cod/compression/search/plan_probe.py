"""Divergence of a model that is compressed by a plan, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.search.variants import Rounding, Variants
from hf_cod.io.files import fingerprint
from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch, describe_batches, split_samples
from hf_cod.layers.partial_forward import State
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs
from hf_cod.scoring.divergence_probe import DivergenceProbe

Values = Mapping[str, float]
"""Name of each matrix -> its sparsity, or bits."""


class PlanProbe(DivergenceProbe):
    """KL divergences of whole plans from the intact language model, in nats per token.

    A plan and a sample cost one forward pass of the compressed model. That of the intact model runs once; its last
    layer and its head run again for each comparison, so that memory holds the logits of one sample, twice, and of all
    samples only the hidden states before the last layer.

    Args:
        stack: the layers of a language model with weights in memory.
        names: of the matrices that plans change.
        pruner: one of `scoring.settings.PRUNERS`.
        statistics: statistics of this model; None for magnitude.
        batches: the samples to measure on.
        journal: stores each (plan, sample); stored entries are not computed again.
        bar: progress bar of the passes.
        rounding, outside: see `Variants`.

    Raises:
        ValueError: see `PruningProbe`.
    """

    def __init__(
        self,
        stack: DecoderLayers,
        names: Sequence[str],
        pruner: str,
        statistics: LayerStatistics | None,
        batches: Sequence[Batch],
        journal: Journal,
        bar: Any,
        rounding: Rounding | None = None,
        outside: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(stack, pruner, statistics, _single(batches), show_progress=False)
        self._variants = Variants(stack, names, pruner, statistics, rounding, outside)
        self._journal, self._bar = journal, bar
        self._seen: set[str] = set()
        self._states: list[State] | None = None

    @property
    def bytes(self) -> int:
        """The number of bytes of the prepared matrices, beside the model."""
        return self._variants.bytes

    @property
    def passes(self) -> int:
        """The number of forward passes so far, those in the journal included."""
        return len(self._seen)

    @torch.no_grad()
    def of_plans(self, plans: Sequence[Values], samples: Sequence[int]) -> list[float]:
        """The mean over the tokens of these samples, for each plan. The model is intact afterwards.

        Raises:
            ValueError: a divergence that is not finite.
        """
        try:
            with evaluation_mode(self.stack):
                for sample in samples:
                    self._run(plans, sample)
        finally:
            self._variants.restore()
        return [self._mean(plan, samples) for plan in plans]

    def _run(self, plans: Sequence[Values], sample: int) -> None:
        """Measures the plans that the journal lacks on one sample."""
        teacher: Tensor | None = None
        for plan in plans:
            key = _key(plan, sample)
            if not self._journal.is_sound(key, _check):
                teacher = self._teacher(sample) if teacher is None else teacher
                self._variants.put(plan)
                student = self.stack.model(**model_inputs(self.stack.model, self.batches[sample])).logits
                self._journal.add(key, [*self._compared(self.batches[sample], teacher, student)])
            if key not in self._seen:
                self._seen.add(key)
                self._bar.update()

    def _teacher(self, sample: int) -> Tensor:
        """The logits of the intact model."""
        last = len(self.stack) - 1
        if self._states is None:
            self._variants.restore()
            self._states = self._until(range(last), [None] * len(self.batches))
        changed = self._variants.of_layer(last)
        self._variants.put(dict.fromkeys(changed))
        logits = self._logits(self.batches[sample], self._states[sample])
        self._variants.put(changed)
        return logits

    def _mean(self, plan: Values, samples: Sequence[int]) -> float:
        found = [self._journal.result(_key(plan, sample), tuple[float, float]) for sample in samples]
        mean = sum(total for total, _ in found) / max(sum(tokens for _, tokens in found), 1)
        if not math.isfinite(mean):
            raise ValueError(f"plan: expected a finite divergence, got {mean}")
        return mean


def _single(batches: Sequence[Batch]) -> list[Batch]:
    """Each sample as a batch of its own."""
    found: list[Batch] = []
    rest = list(batches)
    for _ in range(describe_batches(batches)["samples"]):
        one, rest = split_samples(rest, 1)
        found += one
    return found


def _key(plan: Values, sample: int) -> str:
    return f"plan {fingerprint(dict(plan))} {sample}"


def _check(value: Any) -> None:
    """Checks a result from the journal, which may be another one's file."""
    total, tokens = check_value(value, tuple[float, float], "plan")
    check_value(total, float, "divergence", limits(least=-1e-3))  # up to rounding
    check_value(tokens, float, "tokens", limits(least=0))
