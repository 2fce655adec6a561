"""Calibration and tuning samples of a plan: given as batches, or cut from one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_cod.io.settings import SampleSettings
from hf_cod.io.text import Batch, check_batches, describe_batches, split_samples
from hf_cod.layers.batches import EITHER, SAMPLE_FIELDS, batches_of, check_either, required
from hf_cod.layers.inputs import check_inputs


def check_given(calibration: Any, tuning: Any, tokenizer: Any, texts: Any) -> None:
    """Checks that samples were passed in one of the two ways, before a model is loaded.

    Raises:
        ValueError: they were not, or they are no batches.
    """
    for name, batches in (("calibration", calibration), ("tuning", tuning)):
        check_either(batches, tokenizer, texts, name)
        if texts is not None:
            continue
        if batches is None:
            raise ValueError(f"{name}: {EITHER}, got neither")
        if not batches:
            raise ValueError(f"{name}: expected at least one batch, got none")
        check_batches(batches)


def calibration_and_tuning(
    model: nn.Module,
    calibration: Sequence[Batch] | None,
    tuning: Sequence[Batch] | None,
    tokenizer: Any,
    texts: Any,
    samples: SampleSettings | None,
    given: Mapping[str, Any],
    tuning_samples: int,
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Batches on which methods calibrate, and other ones on which losses are measured.

    `tuning_samples` samples are cut from the texts in addition to `max_samples`; the later ones are those for tuning.

    Raises:
        ValueError: too little text, or batches on which the model cannot run; see also `batches_of`.
    """
    if calibration is None or tuning is None:
        cut = replace(samples or SampleSettings(), **{n: v for n, v in given.items() if n in SAMPLE_FIELDS})
        both = replace(cut, max_samples=cut.max_samples + tuning_samples)
        batches = required(batches_of(model, None, tokenizer, texts, both, {}))
        calibration, tuning = split_off(batches, tuning_samples / both.max_samples)
    else:
        required(batches_of(model, calibration, tokenizer, texts, samples, given))  # checks the other arguments
    for name, found in (("calibration", calibration), ("tuning", tuning)):
        check_inputs(model, found, name)
    return calibration, tuning


def split_off(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """Splits batches into calibration samples and tuning samples, a share of all, at least one of each.

    Raises:
        ValueError: there is only one sample.
    """
    count = describe_batches(batches)["samples"]
    if count < 2:
        raise ValueError(
            f"texts: expected at least two samples, for calibration and for the choice of the plan, got {count}; use "
            "more text or a shorter sequence_length"
        )
    return split_samples(batches, count - min(count - 1, max(1, round(count * share))))
