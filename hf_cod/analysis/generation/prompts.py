"""Prompts of tasks as token ids, in batches that are padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.generation.task import GenerationTask
from hf_cod.io.chat import find_answers, tokens_of
from hf_cod.io.records import Record
from hf_cod.io.text import IGNORED_LABEL


@dataclass(frozen=True)
class Prompts:
    """The prompts of tasks.

    Attributes:
        ids: the tokens of each prompt.
        references: the tokens of its reference answer, with the end of the text.
        places: (task, number of the prompt in it) of each.
        left_out: number of prompts that are longer than the model's positions with their answers.
    """

    ids: list[list[int]]
    references: list[list[int]]
    places: list[tuple[int, int]]
    left_out: int = 0


def tokenized(tokenizer: Any, tasks: Sequence[GenerationTask], longest: int | None, new: int) -> Prompts:
    """Tokenizes prompts and reference answers. A prompt is the tokens that it shares with its reference answer behind
    it, so that all readings continue the same tokens.

    Args:
        tokenizer: a transformers tokenizer.
        tasks: the tasks. Prompts of several tasks alternate, so that each part of them is a part of every task.
        longest: number of positions of the model; None: no limit.
        new: number of tokens that are generated.

    Raises:
        ValueError: a prompt that cannot be tokenized, or none that is short enough.
    """
    found = find_answers(tokenizer, None) if any(isinstance(p, list) for task in tasks for p in task.prompts) else None
    prompts, left_out = Prompts([], [], []), 0
    for number in range(max(len(task.prompts) for task in tasks)):
        for place, task in enumerate(tasks):
            if number >= len(task.prompts):
                continue
            record = _record(task.prompts[number], task.references[number], number + 1)
            ids, answers = tokens_of(tokenizer, record, found)  # type: ignore[arg-type]
            start = answers.index(True) if True in answers else len(ids)
            if start == 0:
                raise ValueError(f"tasks: expected prompts with a token, got prompt {number} of {task.name} without")
            if longest is not None and max(len(ids), start + new) > longest:
                left_out += 1
                continue
            prompts.ids.append(ids[:start])
            prompts.references.append(ids[start:])
            prompts.places.append((place, number))
    if not prompts.ids:
        raise ValueError(f"tasks: expected prompts with answers of at most {longest} tokens, got only longer ones")
    return Prompts(prompts.ids, prompts.references, prompts.places, left_out)


def _record(prompt: Any, reference: str, row: int) -> Record:
    if isinstance(prompt, str):
        return Record(prompt=prompt, completion=reference, row=row)
    answer = [{"role": "assistant", "content": reference}]
    return Record(messages=[*prompt, *answer], prompt=prompt, completion=answer, row=row)


def padded_left(prompts: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, both (S, T) int64."""
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(each)) + [*each] for each in prompts]
    mask = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def answer_batches(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], padding: int
) -> list[dict[str, Tensor]]:
    """Batches whose labels are the answers: input_ids, attention_mask and labels, (S, T) int64, padded on the right.

    Args:
        prompts: tokens of each prompt.
        answers: tokens behind it.
        groups: numbers of the prompts of each batch.
        padding: token for padding.
    """
    batches = []
    for group in groups:
        longest = max(len(prompts[i]) + len(answers[i]) for i in group)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for i in group:
            asked, said = [*prompts[i]], [*answers[i]]
            left = longest - len(asked) - len(said)
            rows["input_ids"].append([*asked, *said, *[padding] * left])
            rows["attention_mask"].append([1] * (longest - left) + [0] * left)
            rows["labels"].append([IGNORED_LABEL] * len(asked) + said + [IGNORED_LABEL] * left)
        batches.append({name: torch.tensor(values) for name, values in rows.items()})
    return batches
