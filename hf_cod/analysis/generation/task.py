"""A task: prompts, reference answers, and what scores an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_cod.io.arguments import checked
from hf_cod.io.records import Message


def exact_match(answer: str, reference: str) -> float:
    """1 if both are equal without the space around them, else 0."""
    return float(answer.strip() == reference.strip())


@checked
@dataclass(frozen=True)
class GenerationTask:
    """Prompts that a model answers, and how its answers are scored.

    Attributes:
        name: the name in reports.
        prompts: text, which the model continues as it is, or messages, which the tokenizer's chat template renders.
        references: the right answer to each prompt.
        score: `score(answer, row)` in [0, 1], higher is better; default: exact match.
        rows: the second argument of `score` for each prompt; default: the references.

    Raises:
        ValueError: no prompt, or other numbers of references or rows.
    """

    name: str
    prompts: Sequence[str | list[Message]]
    references: Sequence[str]
    score: Callable[..., Any] = exact_match
    rows: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if not count:
            raise ValueError(f"prompts: expected at least one in the task {self.name}, got none")
        for name, values in (("references", self.references), ("rows", self.rows)):
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: expected {count}, one for each prompt of {self.name}, got {len(values)}")

    def scored(self, answer: str, number: int) -> float:
        """The score of an answer to a prompt.

        Raises:
            ValueError: the scorer failed, or returned no number in [0, 1].
        """
        row = (self.references if self.rows is None else self.rows)[number]
        try:
            found = float(self.score(answer, row))
        except Exception as error:
            raise ValueError(f"tasks: the scorer of {self.name} failed on prompt {number}: {error}") from error
        if not 0 <= found <= 1:
            raise ValueError(f"tasks: expected scores from 0 to 1, got {found} for prompt {number} of {self.name}")
        return found


def chosen_rows(count: int, most: int, seed: int) -> list[int]:
    """At most `most` of `count` rows, by seed, in a random order: a part of them is a sample of all."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()
    return order
