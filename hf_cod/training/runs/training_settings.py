"""How a model is trained on, whichever method trains it; the help texts feed the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.training.owlore.settings import OwLoreSettings

DEFAULT_STEPS = 300
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
    steps: int | None = field(default=None, metadata={"help": f"optimizer steps (default: {DEFAULT_STEPS})"})
    batch_size: int = field(default=16, metadata={"help": "samples in an optimizer step"})
    micro_batch_size: int = field(default=4, metadata={"help": "samples in a forward pass"})
    sequence_length: int = field(default=256, metadata={"help": "tokens in a sample"})
    eval_samples: int = field(default=32, metadata={"help": "samples, of the text's end, to measure perplexity on"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0: not at all"})
    checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in the backward pass: less memory, more time"}
    )
    bf16: bool = field(default=False, metadata={"help": "train under bfloat16 autocast"})
    lora_rank: int = field(default=16, metadata={"help": "lora: its rank"})
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints; a killed run goes on from one"})
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
        """Optimizer steps in all."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def resolved(self) -> dict[str, Any]:
        """Every setting, with what stands for a default."""
        return {**asdict(self), "learning_rate": self.rate, "steps": self.total_steps}


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
