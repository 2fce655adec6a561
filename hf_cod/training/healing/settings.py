"""Settings of healing; the help texts feed the command line."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.functional.mixture import check_mixture
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.settings import SampleFields, check_effect, check_least, check_seed
from hf_cod.training.runs.training_settings import MANY_PASSES, TrainingSettings, warn_of_passes

logger = logging.getLogger(__name__)

RECOVERY_STEPS = 100
FEW_STEPS = 10  # below this number, tokens are worth a warning
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@renamed(labels="label_weight", hidden="hidden_weight")
@checked
@dataclass
class HealSettings(TrainingSettings):
    """Distillation of a teacher into a student."""

    tokens: str | None = field(
        default=None,
        metadata={
            "help": "number of training tokens, such as 500k or 2M, instead of --steps; a shorter text is repeated; "
            "default: the number of steps decides"
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "temperature T of the predictions of student and teacher; above 1, unlikely tokens count more"
        },
    )
    label_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the cross-entropy of the next token, 0 to 1; the distillation loss has the rest of the "
            "weight"
        },
    )
    hidden_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the relative squared error between hidden states of student and teacher, which is "
            "added to the loss of the logits; 0: not computed"
        },
    )
    teacher_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "with --hidden-weight: for each layer of the student, the index (from 0) of the teacher's layer to "
            "compare it with; default: from the student's config, else by most similar weights, else evenly spaced"
        },
    )
    labels = OldAttribute("label_weight")
    hidden = OldAttribute("hidden_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None:
            count_tokens(self.tokens)
            if self.steps is not None:
                raise ValueError(f"tokens: expected none with steps, got {self.tokens!r} and {self.steps}")
        check_mixture(self.temperature, self.label_weight)
        if not 0 <= self.hidden_weight < math.inf:
            raise ValueError(f"hidden_weight: expected a weight of at least 0, got {self.hidden_weight}")
        if self.teacher_layers is not None and not self.hidden_weight:
            raise ValueError("teacher_layers: expected hidden_weight above 0 with them, got 0")
        if self.label_weight == 1:
            check_effect(self, ["temperature"], "label_weight 1, which leave out the distillation loss")

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps: `steps`, or as many as `tokens` requires."""
        if self.tokens is None:
            return super().total_steps
        return math.ceil(count_tokens(self.tokens) / (self.batch_size * self.sequence_length))

    @property
    def follows_samples(self) -> bool:
        """As in a training without tokens, which say how many steps there are."""
        return self.tokens is None and super().follows_samples


class HealFields(TypedDict, total=False):
    """Fields of `HealSettings` that `heal` takes by name."""

    method: str
    score: str
    threshold: float
    learning_rate: float | None
    steps: int | None
    batch_size: int
    micro_batch_size: int
    sequence_length: int
    eval_samples: int
    max_grad_norm: float
    checkpointing: bool
    bf16: bool
    lora_rank: int
    save_every: int
    log_every: int
    passes: float
    tokens: str | None
    temperature: float
    label_weight: float
    hidden_weight: float
    teacher_layers: list[int] | None


@checked
@dataclass
class RecoverySettings:
    """LoRA training of a pruned model."""

    steps: int | None = field(
        default=None,
        metadata={
            "help": "training steps of LoRA, each on one batch; zeros stay zeros (requires peft); default: "
            f"{RECOVERY_STEPS}, or fewer if {MANY_PASSES} passes over the batches take fewer"
        },
    )
    rank: int = field(default=8, metadata={"help": "rank of the adapters; a higher rank trains more weights"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate of the adapters"})
    seed: int = field(default=0, metadata={"help": "seed of the initial adapters and of the order of the batches"})

    def __post_init__(self) -> None:
        check_least(self, steps=1, rank=1)
        check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")

    def steps_on(self, batches: int) -> int:
        """How many steps are made on so many batches; warns where a number that was given is many passes."""
        if self.steps is None:
            return min(RECOVERY_STEPS, MANY_PASSES * batches)
        warn_of_passes(self.steps, self.steps / batches, batches)
        return self.steps


class RecoveryFields(SampleFields, total=False):
    """Fields of `RecoverySettings`, and of samples, that `recover` takes by name."""

    rank: int
    learning_rate: float


def warn_of_few_steps(settings: HealSettings) -> None:
    """Warns before a training whose tokens are only a few steps."""
    if settings.tokens is not None and settings.total_steps < FEW_STEPS:
        logger.warning(
            "tokens: %s are %d optimizer steps of %d samples of %d tokens, which change little; use more tokens, or a "
            "smaller --batch-size",
            settings.tokens,
            settings.total_steps,
            settings.batch_size,
            settings.sequence_length,
        )


def count_tokens(told: str) -> int:
    """The number of tokens in a text such as "2M", "500k" or "300000".

    Raises:
        ValueError: the text is no such number, or the number is below 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(told).strip().lower())
    found = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if found < 1:
        raise ValueError(f"tokens: expected a number such as 2M or 500k, got {told!r}")
    return found
