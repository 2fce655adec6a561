"""Settings of `measure_generation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import check_least, check_number, check_seed

# Reading -> its meaning.
READINGS = {
    "reference_loss": "likelihood of the task's reference answers",
    "chain_loss": "likelihood of the intact model's own answers",
    "task_accuracy": "mean score of the generated answers",
}


@checked
@dataclass
class GenerationSettings:
    """How a model answers the prompts of tasks."""

    max_prompts: int = field(default=64, metadata={"help": "maximum number of prompts of a task, chosen by seed"})
    max_new_tokens: int = field(default=64, metadata={"help": "maximum number of tokens of an answer"})
    temperature: float = field(
        default=0.0,
        metadata={"help": "0: answers are the most probable tokens (greedy); above 0: sampled at this temperature"},
    )
    stop_early: bool = field(
        default=True,
        metadata={
            "help": "give a model without a layer no further prompts as soon as its accuracy is clearly lower or "
            "higher than the intact model's"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "prompts that are answered at once"})
    seed: int = field(default=0, metadata={"help": "seed of prompts, sampled answers and intervals"})

    def __post_init__(self) -> None:
        check_least(self, max_prompts=1, max_new_tokens=1, batch_size=1)
        check_number("temperature", self.temperature, 0)
        check_seed(self.seed)


class GenerationFields(TypedDict, total=False):
    """Fields of `GenerationSettings` that `measure_generation` takes by name."""

    max_prompts: int
    max_new_tokens: int
    temperature: float
    stop_early: bool
    batch_size: int
    seed: int
