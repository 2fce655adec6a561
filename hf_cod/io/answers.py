"""Samples for training on answers: one for each record, padded, or several packed in a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_cod.io.chat import find_answers, tokens_of
from hf_cod.io.records import Record
from hf_cod.io.text import IGNORED_LABEL, Batch

Sample = tuple[list[int], list[int]]
"""Token ids, and labels: IGNORED_LABEL at tokens that are no answer."""


@dataclass(frozen=True)
class Answers:
    """Tokenized records.

    Attributes:
        samples: one for each record that has an answer within the length, in the order of the records.
        notes: how answers were found, what was truncated, and what was left out.
        by: how answers in conversations were found, as in `io/chat.py`; None without conversations.
    """

    samples: list[Sample]
    notes: list[str]
    by: str | None = None


def answers_of(tokenizer: Any, records: Iterable[Record], length: int) -> Answers:
    """Tokenizes records, with labels at their answers only, as TRL's SFTTrainer does (`assistant_only_loss`,
    `completion_only_loss`, `truncation_mode="keep_start"`).

    Args:
        tokenizer: a transformers tokenizer.
        records: the records.
        length: maximum number of tokens of a sample; further ones are cut off.

    Raises:
        ValueError: no record has an answer, or `tokens_of` refuses one.
    """
    samples: list[Sample] = []
    count = unanswered = cut = beyond = 0
    notes: list[str] = []
    found, by = None, None
    for record in records:
        count += 1
        if not record.answered:
            unanswered += 1
            continue
        if found is None:
            found = find_answers(tokenizer, record.template)
            if record.prompt is None:
                by = found.by
                notes.append(f"the loss is on answers alone; {found.told}")
        ids, mask = tokens_of(tokenizer, record, found)
        labels = [token if answer else IGNORED_LABEL for token, answer in zip(ids, mask, strict=True)][:length]
        cut += len(ids) > length
        if any(label != IGNORED_LABEL for label in labels[1:]):  # the first token is not predicted
            samples.append((ids[:length], labels))
        else:
            beyond += 1
    left_out = f"{unanswered} without an answer, {beyond} without one in the first {length} tokens"
    if not samples:
        raise ValueError(f"text: expected records with answers, got {count} records, {left_out}")
    if unanswered or beyond:
        notes.append(f"{unanswered + beyond} of {count} records were left out: {left_out}")
    if cut:
        notes.append(f"{cut} of {count} records were truncated to {length} tokens")
    return Answers(samples, notes, by)


@dataclass(frozen=True)
class AnswerRows:
    """Rows of samples for training.

    Attributes:
        samples: the samples.
        bins: samples of each row.
        packed: whether rows have positions, which begin anew at each sample: by them transformers masks attention
            between samples. Otherwise rows have one sample each, and an attention mask.
        padding: token for padding.
    """

    samples: Sequence[Sample]
    bins: Sequence[Sequence[int]]
    packed: bool
    padding: int

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row as input_ids, labels and position_ids, all (T,) int64."""
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for number in self.bins[index]:
            ids, labels = self.samples[number]
            row["input_ids"] += ids
            row["labels"] += [IGNORED_LABEL, *labels[1:]]  # not predicted by the sample before
            row["position_ids"] += range(len(ids))
        return {name: torch.tensor(values) for name, values in row.items()}

    def collate(self, rows: Sequence[Batch]) -> dict[str, Tensor]:
        """A batch (S, T), padded on the right; padding is a sample of its own."""
        ids, labels, places = ([row[name] for row in rows] for name in ("input_ids", "labels", "position_ids"))
        batch = {
            "input_ids": pad_sequence(ids, True, self.padding),
            "labels": pad_sequence(labels, True, IGNORED_LABEL),
        }
        if self.packed:
            return {**batch, "position_ids": pad_sequence(places, True, 0)}
        return {**batch, "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], True, 0)}

    def batches(self, most: int, size: int) -> list[Batch]:
        """The first samples, each in a row of its own, for measurements."""
        alone = replace(self, bins=[[index] for index in range(len(self.samples))][:most], packed=False)
        rows = [alone[index] for index in range(len(alone))]
        return [alone.collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def rows_of(samples: Sequence[Sample], length: int, packed: bool, tokenizer: Any) -> AnswerRows:
    """Rows of one sample each, or packed ones.

    Args:
        samples: the samples.
        length: maximum number of tokens of a row.
        packed: whether several samples share a row.
        tokenizer: the tokenizer, for its padding token.
    """
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    padding = next(token for token in known if token is not None)
    sizes = [len(ids) for ids, _ in samples]
    return AnswerRows(samples, fill(sizes, length) if packed else [[i] for i in range(len(sizes))], packed, padding)


def fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packs samples into rows by best fit, the longest first, as TRL's `bfd`.

    Args:
        sizes: tokens of each sample, at most `length`.
        length: maximum number of tokens of a row.

    Returns:
        Samples of each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # sizes of free space, ascending, each once
    by_space: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect_left(free, sizes[index])
        if place == len(free):
            row, space = len(rows), length
            rows.append([])
        else:
            space = free[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del free[place]
        rows[row].append(index)
        left = space - sizes[index]
        if not by_space[left]:
            insort(free, left)
        by_space[left].append(row)
    return rows
