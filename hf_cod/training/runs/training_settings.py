"""How a model is trained on, whichever method trains it; the help texts feed the command line."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from hf_cod.io.arguments import checked
from hf_cod.io.settings import following
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.training.owlore.settings import OwLoreSettings

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 300
# Passes over the samples: how many the default number of steps makes at most, as many as transformers' Trainer makes;
# and from how many on a number that a user gave is worth a warning, because a model learns its samples by heart.
DEFAULT_PASSES, MANY_PASSES = 3.0, 20
# Samples in a step and in a forward pass, steps between checkpoints and between logged losses, where neither is given.
BATCH, MICRO_BATCH, SAVE_EVERY, LOG_EVERY = 16, 4, 100, 10
# Method -> what trains; `methods.METHODS` has the optimizers.
METHODS = {
    "owlore": "a few layers at a time, drawn by their scores, with low-rank moments",
    "lisa": "a few layers at a time, drawn alike, and embeddings and head",
    "galore": "all layers, with low-rank moments",
    "owlore-peft": "adapters of a few layers at a time, drawn by their scores (needs peft)",
    "lora": "LoRA adapters of all layers (needs peft)",
    "full": "all weights",
}
# Method -> a peak to begin with; the best one depends on model, task and length.
LEARNING_RATES = {"owlore": 1e-3, "lisa": 3e-4, "galore": 1e-3, "owlore-peft": 1e-3, "lora": 3e-4, "full": 5e-5}
# Methods that draw layers by their scores.
DRAW_BY_SCORES = ("owlore", "owlore-peft")


@checked
@dataclass
class TrainingSettings:
    """How a model is trained on."""

    method: str = field(default="owlore", metadata={"help": "what trains", "choices": list(METHODS)})
    score: str = field(default="owl", metadata={"help": "owlore: the score that layers are drawn by"})
    threshold: float = field(default=13.0, metadata={"help": "owlore: M of the score owl (paper: 13)"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak, after a warm-up over a tenth of the steps; default: the method's"}
    )
    steps: int | None = field(
        default=None,
        metadata={"help": f"optimizer steps; default: {DEFAULT_STEPS}, or as many as --passes over the samples take"},
    )
    passes: float = field(
        default=DEFAULT_PASSES, metadata={"help": "without --steps: most passes over the samples of the text"}
    )
    batch_size: int = following(
        f"samples in an optimizer step; default: {BATCH}, or the next multiple of --micro-batch-size"
    )
    micro_batch_size: int = following(
        f"samples in a forward pass; default: {MICRO_BATCH}, or the largest number below it that divides --batch-size"
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens in a sample"})
    eval_samples: int = field(default=32, metadata={"help": "samples, of the text's end, to measure perplexity on"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0: not at all"})
    checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in the backward pass: less memory, more time"}
    )
    bf16: bool = field(default=False, metadata={"help": "train under bfloat16 autocast"})
    lora_rank: int = field(default=16, metadata={"help": "lora: its rank"})
    save_every: int = following(
        f"steps between checkpoints, from which a killed run resumes; default: {SAVE_EVERY}, or the last multiple of "
        "--log-every before it"
    )
    log_every: int = following(
        f"steps between logged losses; default: {LOG_EVERY}, or the largest number below it that divides --save-every"
    )

    def __post_init__(self) -> None:
        for name, valid in (("method", METHODS), ("score", SCORES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}")
        counts = ("steps", "batch_size", "micro_batch_size", "sequence_length", "eval_samples", "lora_rank")
        for name in (*counts, "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self._follow()
        if not 0 < self.passes < math.inf:
            raise ValueError(f"passes: expected a number above 0, got {self.passes}")
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold: expected a finite number above 0, got {self.threshold}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm: expected a number of at least 0, got {self.max_grad_norm}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: expected batch_size {self.batch_size} to be a multiple of it, got "
                f"{self.micro_batch_size}"
            )
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every: expected a multiple of log_every ({self.log_every}), got {self.save_every}; set both"
            )

    def _follow(self) -> None:
        """Gives what the user left out a value that goes with what was given."""
        if self.batch_size is None:
            micro = self.micro_batch_size or MICRO_BATCH
            self.batch_size = micro * math.ceil(BATCH / micro)
        if self.micro_batch_size is None:
            self.micro_batch_size = _largest_divisor(self.batch_size, MICRO_BATCH)
        if self.log_every is None:
            self.log_every = LOG_EVERY if self.save_every is None else _largest_divisor(self.save_every, LOG_EVERY)
        if self.save_every is None:
            self.save_every = self.log_every * max(1, SAVE_EVERY // self.log_every)

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def resolved(self) -> dict[str, Any]:
        """Every setting, with what stands for a default; passes only say how many steps there are."""
        told = {**asdict(self), "learning_rate": self.rate, "steps": self.total_steps}
        del told["passes"]
        return told

    @property
    def follows_samples(self) -> bool:
        """Whether the number of steps is not known before that of the samples."""
        return self.steps is None


Trained = TypeVar("Trained", bound=TrainingSettings)


def for_samples(settings: Trained, samples: int, begun: int | None = None) -> Trained:
    """The settings with a number of steps that suits so many samples to train on; warns where that is few for them.

    Args:
        settings: what the user asked for.
        samples: windows to train on.
        begun: the steps that an interrupted run, which goes on, was to make.
    """
    if settings.follows_samples:
        most = max(1, math.ceil(settings.passes * samples / settings.batch_size))
        steps = begun or min(DEFAULT_STEPS, most)
        if steps < DEFAULT_STEPS:
            logger.warning(
                "steps: %d instead of the default %d: %g passes over the %d samples to train on; --passes or --steps "
                "asks for more",
                steps,
                DEFAULT_STEPS,
                round(steps * settings.batch_size / samples, 1),
                samples,
            )
        return replace(settings, steps=steps)
    warn_of_passes(settings.total_steps, settings.total_steps * settings.batch_size / samples, samples)
    return settings


def warn_of_passes(steps: int, passes: float, samples: int) -> None:
    """Says before a training that it will pass over its few samples many times."""
    if passes > MANY_PASSES:
        logger.warning(
            "steps: %d are %d passes over the %d samples to train on, which the model learns by heart; fewer steps or "
            "a longer text avoid that",
            steps,
            round(passes),
            samples,
        )


def _largest_divisor(number: int, most: int) -> int:
    """The largest number up to `most` that divides another one."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def check_fused(settings: TrainingSettings, sampling: OwLoreSettings) -> None:
    """Makes sure that an update inside the backward pass can do what the settings ask for.

    Raises:
        ValueError: accumulation or clipping, for which whole gradients would have to wait.
    """
    if sampling.fused and settings.batch_size != settings.micro_batch_size:
        raise ValueError(
            f"fused: expected a micro_batch_size of {settings.batch_size}, the batch_size, beside it, got "
            f"{settings.micro_batch_size}"
        )
    if sampling.fused and settings.max_grad_norm:
        raise ValueError(f"fused: expected a max_grad_norm of 0 beside it, got {settings.max_grad_norm:g}")


def check_scores(settings: TrainingSettings, file: str | None) -> None:
    """Makes sure that scores are given to a method alone that draws layers by them.

    Raises:
        ValueError: it draws none.
    """
    if file is not None and settings.method not in DRAW_BY_SCORES:
        raise ValueError(f"scores: expected none with {settings.method}, which draws no layers by them, got {file!r}")
