"""Measures combinations of steps, each once, by applying them to a new copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.analysis.evaluation.metrics import MOST_NATS
from hf_cod.compression.fit.knobs import KNOBS, Applying, ApplyingFields
from hf_cod.io.arguments import checked
from hf_cod.io.journal import Journal
from hf_cod.io.schema import brief, check_value, limits
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batch, Texts, Tokenizer
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.size import ModelSize, size_of

Steps = dict[str, float]
"""Knob -> level, in any order; applied in the order of `KNOBS`."""


@dataclass(frozen=True)
class Trial:
    """One measured combination.

    Attributes:
        steps: knob -> level.
        loss: nats a token.
        size: of the model with these steps.
    """

    steps: Steps
    loss: float
    size: ModelSize


class Trials:
    """Measures combinations, and saves the results to a journal.

    Args:
        make: loads a new copy of the intact model at each call; one copy at a time is in memory.
        calibration: batches on which methods calibrate.
        tuning: other batches, on which losses are measured.
        directory: for the journal and for the measurements of methods; or None.
        work: fingerprint of the model and the batches.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        intact: size of the intact model; no step makes it larger.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        calibration: Sequence[Batch],
        tuning: Sequence[Batch],
        directory: str | Path | None,
        work: str,
        layers_path: str | None,
        intact: ModelSize,
    ) -> None:
        self._make, self._tuning, self._intact = make, tuning, intact
        kept = None if directory is None else Path(directory)
        self._how = Applying(calibration, layers_path=layers_path, measured=kept)
        self._journal = Journal(None if kept is None else kept / "trials.jsonl", work)

    def measure(self, steps: Steps) -> Trial:
        """The loss and the size of a model with these steps.

        Raises:
            ValueError: a loss that is not finite, or an error of a method.
        """
        key = "trial " + " ".join(f"{knob} {steps[knob]:g}" for knob in KNOBS if knob in steps)
        if not self._journal.is_sound(key, partial(_check, steps, self._intact)):
            model = self._make()
            apply_steps(model, steps, self._how)
            loss = math.log(held_out_perplexity(model, self._tuning, self._how.layers_path))
            if not math.isfinite(loss):
                raise ValueError(f"loss: expected a finite one, got {loss} with {steps}")
            self._journal.add(key, [loss, asdict(size_of(model, self._how.layers_path))])
        loss, size = self._journal.result(key, tuple[float, ModelSize])
        return Trial(steps, loss, size)


def _check(steps: Steps, intact: ModelSize, value: Any) -> None:
    """Checks a trial from the journal, which may be another one's file: the plan is chosen by these numbers."""
    loss, size = check_value(value, tuple[float, ModelSize], "trial")
    check_value(loss, float, "loss", limits(least=0, most=MOST_NATS))
    for name, most in asdict(intact).items():
        check_value(getattr(size, name), int, name, limits(least=1, most=most))
    if size.layer_bytes > size.bytes:
        raise ValueError(f"layer_bytes: expected up to {size.bytes} (bytes), got {size.layer_bytes}")
    if not steps and size != intact:
        raise ValueError(f"size: expected {brief(asdict(intact))}, got {brief(asdict(size))}")


@for_one_thread
@checked
def apply_steps(
    model: nn.Module,
    steps: Steps,
    how: Applying | None = None,
    *,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[ApplyingFields],
) -> None:
    """Applies each step in place, in the order of `KNOBS`.

    Args:
        model: a transformers model with plain weights.
        steps: knob -> level, those of a `FitPlan`.
        how: the inputs of knobs.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        **fields: or fields of `Applying` by name: batches (dicts for the model's forward; `token_batches` makes them
            from texts), journal, layers_path, show_progress, measured; for texts, also fields of `SampleSettings`:
            sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: an unknown knob, or an error of a method.
    """
    given = fields.get("batches", None if how is None else how.batches)
    batches = required(batches_of(model, given, tokenizer, texts, samples, fields))
    chosen = resolve(apply_steps, Applying, how, fields, batches=batches)
    for knob, level in steps.items():
        if knob not in KNOBS:
            raise ValueError(f"steps: expected {', '.join(KNOBS)}, got {knob!r} ({level:g})")
    for knob in KNOBS:
        if knob in steps:
            KNOBS[knob].apply(model, steps[knob], chosen)
