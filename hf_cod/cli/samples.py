"""Loading of models with tokenizers, and splitting of text into calibration and evaluation samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.cli.parser import model_title
from hf_cod.cli.settings import MeasuringSettings
from hf_cod.io.models import load_model
from hf_cod.io.rows import text_notes
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches, load_texts, split_samples, token_batches
from hf_cod.layers.batches import with_labels
from hf_cod.layers.checks import check_length, check_without_adapter
from hf_cod.layers.running import busy
from hf_cod.layers.stack import unwrap
from hf_cod.reporting.result_card import report_of

logger = logging.getLogger(__name__)

# Commands that train on the text that they are given.
TRAININGS = ("finetune", "heal")
TEXT = "input_ids"  # what models of text read


def load_with_tokenizer(
    source: str,
    loading: ModelSettings,
    instead: str = "hf_cod in Python",
    adapters: bool = False,
    in_files: bool = False,
) -> tuple[nn.Module, Any]:
    """Loads a model and its tokenizer.

    Args:
        source: Hub id, directory or GGUF file.
        loading: settings of model loading.
        instead: what to use for a model without tokenizer; part of the error message.
        in_files: see `load_model`.
        adapters: whether adapters that are not merged are accepted, because the model is only measured.

    Raises:
        ValueError: the model does not exist; has no tokenizer, without which text cannot be cut into samples, or does
            not read text; or it has an adapter (see `check_without_adapter`).
    """
    with busy(f"loading {model_title(source)}"):
        model, tokenizer = load_model(source, loading, in_files=in_files)
    if not adapters:
        check_without_adapter(model, source)
    if tokenizer is None:
        raise ValueError(f"model: expected a model with a tokenizer, got {source!r}; use {instead}")
    base: Any = unwrap(model)
    reads = getattr(base, "main_input_name", TEXT)
    if reads != TEXT:
        got = f"got {type(base).__name__}, which reads {reads}"
        raise ValueError(f"model: expected one that reads text, of which commands make samples, {got}; use {instead}")
    return model, tokenizer


def check_texts(text: TextSettings, eval_text: str | None) -> None:
    """Checks that the given texts exist, before a model is loaded; warns about columns of records that are not read.

    Raises:
        ValueError: a text does not exist; names the option.
    """
    load_texts(text)
    for note in text_notes(text):
        if "not read" in note:
            logger.warning("text: %s", note)
    if eval_text is None:
        return
    try:
        load_texts(replace(text, text=eval_text))
    except ValueError as error:
        raise ValueError(f"eval_{error}" if str(error).startswith("text") else str(error)) from error


def trained_on(source: str, text: TextSettings, eval_text: str | None) -> list[str]:
    """A note if the report in the directory of a model says that it was trained on the text it is evaluated on."""
    try:
        report, _ = report_of(source)
    except ValueError:  # none, or of other origin
        return []
    measured = text.text if eval_text is None else eval_text
    known = report.kind in TRAININGS and "text" in report.settings
    if not known or not _same_text(report.settings["text"], measured):
        return []
    shown = "the embedded text" if measured is None else Path(measured).name
    return [
        f"the input model was trained on {shown} ({report.kind}), so that the perplexities of the evaluation samples "
        "are too low for other text; --eval-text measures on a text that it was not trained on"
    ]


def _same_text(first: Any, second: str | None) -> bool:
    if first == second:
        return True
    try:
        return isinstance(first, str) and second is not None and Path(first).samefile(second)
    except OSError:
        return False


def split_text(
    model: nn.Module, tokenizer: Any, text: TextSettings, settings: MeasuringSettings
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Disjoint calibration and evaluation samples; from one text, the earlier and the later samples.

    Raises:
        ValueError: the text is too short for both, or samples are too long for the model.
    """
    check_length(model, settings.sequence_length)
    calibrating, measuring = settings.max_samples, settings.eval_samples
    first: Sequence[Batch]
    second: Sequence[Batch]
    if settings.eval_text is not None:
        other = load_texts(replace(text, text=settings.eval_text))
        first = token_batches(tokenizer, load_texts(text), settings)
        second = token_batches(tokenizer, other, replace(settings, max_samples=measuring))
    else:
        both = replace(settings, max_samples=calibrating + measuring)
        batches = token_batches(tokenizer, load_texts(text), both)
        drawn = describe_batches(batches)["samples"]
        if drawn < 2:
            raise ValueError(
                f"text: expected at least two samples of {settings.sequence_length} tokens, one for calibration and "
                "one for evaluation, got one; use a longer text, --eval-text, or a shorter --sequence-length"
            )
        share = calibrating / (calibrating + measuring)
        first, second = split_samples(batches, min(drawn - 1, max(1, round(drawn * share))))
    seed = settings.seed
    return with_labels(model, tokenizer, first, seed), with_labels(model, tokenizer, second, seed)
