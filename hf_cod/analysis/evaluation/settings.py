"""Settings of `evaluate_tasks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import check_least


@checked
@dataclass
class TaskSettings:
    """How benchmarks are run."""

    max_samples: int | None = field(default=None, metadata={"help": "maximum number of samples per task; default: all"})
    batch_size: int = field(default=8, metadata={"help": "samples per forward pass"})
    seed: int = field(default=0, metadata={"help": "seed for the choice of few-shot examples"})

    def __post_init__(self) -> None:
        check_least(self, max_samples=1, batch_size=1)


class TaskFields(TypedDict, total=False):
    """Fields of `TaskSettings` that `evaluate_tasks` takes by name."""

    max_samples: int | None
    batch_size: int
    seed: int
