"""Settings of training that all methods share; the help texts feed the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.training.owlore.settings import OwLoreSettings

DEFAULT_STEPS = 300
# Method -> parameters that train; `methods.METHODS` has the optimizers.
METHODS = {
    "owlore": "a few layers at a time, sampled by their scores, with low-rank moments",
    "lisa": "a few layers at a time, sampled uniformly, and embeddings and head",
    "galore": "all layers, with low-rank moments",
    "owlore-peft": "adapters of a few layers at a time, sampled by their scores (requires peft)",
    "lora": "LoRA adapters of all layers (requires peft)",
    "full": "all weights",
}
# Method -> default peak learning rate; the best one depends on model, task and length.
LEARNING_RATES = {"owlore": 1e-3, "lisa": 3e-4, "galore": 1e-3, "owlore-peft": 1e-3, "lora": 3e-4, "full": 5e-5}
# Methods that sample layers by their scores.
DRAW_BY_SCORES = ("owlore", "owlore-peft")


@dataclass
class TrainingSettings:
    """Training by one of the methods in `METHODS`."""

    method: str = field(
        default="owlore", metadata={"help": f"fine-tuning method: {', '.join(METHODS)}", "choices": list(METHODS)}
    )
    score: str = field(default="owl", metadata={"help": "owlore: score by which layers are sampled"})
    threshold: float = field(
        default=13.0, metadata={"help": "owlore: outlier threshold M of the score owl (paper: 13)"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak learning rate, after a warm-up over a tenth of the steps; default: the method's"},
    )
    steps: int | None = field(default=None, metadata={"help": f"optimizer steps (default: {DEFAULT_STEPS})"})
    batch_size: int = field(default=16, metadata={"help": "samples in an optimizer step"})
    micro_batch_size: int = field(default=4, metadata={"help": "samples in a forward pass"})
    sequence_length: int = field(default=256, metadata={"help": "tokens in a sample"})
    eval_samples: int = field(
        default=32, metadata={"help": "held-out samples from the end of the text, to measure perplexity on"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "norm that gradients are clipped to; 0: no clipping"})
    checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in the backward pass: less memory, more time"}
    )
    bf16: bool = field(default=False, metadata={"help": "train under bfloat16 autocast"})
    lora_rank: int = field(default=16, metadata={"help": "lora: rank of the adapters"})
    save_every: int = field(
        default=100, metadata={"help": "steps between checkpoints; an interrupted run resumes from the last one"}
    )
    log_every: int = field(default=10, metadata={"help": "steps between logged losses"})

    def __post_init__(self) -> None:
        for name, valid in (("method", METHODS), ("score", SCORES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}")
        counts = ("steps", "batch_size", "micro_batch_size", "sequence_length", "eval_samples", "lora_rank")
        for name in (*counts, "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
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

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def resolved(self) -> dict[str, Any]:
        """All settings, with defaults filled in."""
        return {**asdict(self), "learning_rate": self.rate, "steps": self.total_steps}


def check_fused(settings: TrainingSettings, sampling: OwLoreSettings) -> None:
    """Checks that the settings are possible with `fused`, the update inside the backward pass.

    Raises:
        ValueError: accumulation or clipping, which require all gradients at the end of the backward pass.
    """
    if sampling.fused and settings.batch_size != settings.micro_batch_size:
        raise ValueError(
            f"fused: expected micro_batch_size equal to batch_size, {settings.batch_size}, got "
            f"{settings.micro_batch_size}; set them to the same value, or set fused to false"
        )
    if sampling.fused and settings.max_grad_norm:
        raise ValueError(f"fused: expected max_grad_norm 0, got {settings.max_grad_norm:g}")


def check_scores(settings: TrainingSettings, file: str | None) -> None:
    """Checks that scores are only given to a method that samples layers by them.

    Raises:
        ValueError: the method does not sample layers by scores.
    """
    if file is not None and settings.method not in DRAW_BY_SCORES:
        raise ValueError(
            f"scores: expected none with {settings.method}, which does not sample layers by scores, got {file!r}"
        )
