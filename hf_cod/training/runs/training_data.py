"""What a model is trained on, and what is held out of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torch import Tensor

from hf_cod.io.answers import AnswerRows, Sample, answers_of, rows_of
from hf_cod.io.packing import pack
from hf_cod.io.records import Record
from hf_cod.io.text import Batch, Texts
from hf_cod.training.runs.packed_rows import keeps_apart
from hf_cod.training.runs.run_directory import ANSWERS_NOTE
from hf_cod.training.runs.training_settings import TrainingSettings

logger = logging.getLogger(__name__)

Windows = Tensor | AnswerRows


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on.

    Attributes:
        windows: windows of text (N, T), or rows of answers.
        held_out: batches to measure perplexity on.
        notes: for the report.
        answers_by: how answers in conversations were found; None without conversations.
    """

    windows: Windows
    held_out: list[Batch]
    notes: list[str]
    answers_by: str | None = None

    def identity(self) -> dict[str, str]:
        """What a run notes, so that it does not resume with other labels."""
        return {} if self.answers_by is None else {ANSWERS_NOTE: self.answers_by}


def training_data(model: Any, tokenizer: Any, texts: Texts, settings: TrainingSettings) -> TrainingData:
    """Windows of joined text with a loss on all tokens, or records with a loss on their answers.

    Raises:
        ValueError: too little text, too few records with answers, or records that cannot be rendered.
    """
    rest = iter([texts] if isinstance(texts, str) else texts)
    begin = [*islice(rest, 1)]
    given = chain(begin, rest)
    if not any(isinstance(text, Record) for text in begin):
        windows, last = split_windows(pack(tokenizer, given, settings.sequence_length), settings)
        return TrainingData(windows, first_batches(last, len(last), settings), [])
    records = (text if isinstance(text, Record) else Record(prompt="", completion=text) for text in given)
    answers = answers_of(tokenizer, records, settings.sequence_length)
    check_enough(len(answers.samples), settings, "records with answers")
    left = len(answers.samples) - settings.eval_samples
    train, held_out = answers.samples[:left], answers.samples[left:]
    packed = _can_pack(model, train)
    rows = rows_of(train, settings.sequence_length, packed, tokenizer)
    measured = rows_of(held_out, settings.sequence_length, False, tokenizer)
    told = f"{len(train)} records were packed into {len(rows)} rows, in which they do not attend to each other"
    if not packed:
        told = f"{len(train)} records were padded, not packed: in a row, the model does not keep them apart"
    batches = measured.batches(len(held_out), settings.micro_batch_size)
    return TrainingData(rows, batches, [*answers.notes, told], answers.by)


def _can_pack(model: Any, samples: Sequence[Sample]) -> bool:
    first, second = (samples[place][0] for place in (0, -1))
    return len(samples) > 1 and keeps_apart(model, first, second)


def check_enough(count: int, settings: TrainingSettings, what: str) -> None:
    """Checks that samples are left to train on; warns where most are held out.

    Raises:
        ValueError: too few.
    """
    left = count - settings.eval_samples
    if left < 1:
        raise ValueError(
            f"text: expected more than the {settings.eval_samples} {what} that are held out, got {count}; use a longer "
            "text, or fewer --eval-samples"
        )
    if left < settings.eval_samples:
        logger.warning(
            "eval_samples: %d of %d samples are held out, and only %d are trained on; fewer --eval-samples or a longer "
            "text gives more",
            settings.eval_samples,
            count,
            left,
        )


def split_windows(windows: Tensor, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Splits windows into training windows and held-out windows; the latter are the last ones of the text.

    Warns where most are held out.

    Raises:
        ValueError: too few windows for both.
    """
    check_enough(len(windows), settings, f"windows of {settings.sequence_length} tokens")
    left = len(windows) - settings.eval_samples
    return windows[:left].long(), windows[left:].long()


def first_batches(windows: Windows, most: int, settings: TrainingSettings) -> list[Batch]:
    """The first windows or samples, in batches for measurements."""
    if isinstance(windows, AnswerRows):
        return windows.batches(most, settings.micro_batch_size)
    return [{"input_ids": part} for part in windows[:most].split(settings.micro_batch_size)]
