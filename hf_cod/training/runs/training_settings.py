"""Settings of training that all methods share; the help texts feed the command line."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from hf_cod.io.arguments import checked, shown
from hf_cod.io.module_names import FIELDS
from hf_cod.io.settings import (
    Default,
    DefaultName,
    DefaultNumber,
    check_choice,
    check_effect,
    check_least,
    check_seed,
    following,
    given,
)
from hf_cod.scoring.settings import COMPUTED, options_of
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.training.owlore.settings import OwLoreSettings

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 300
# Most passes over the samples that the default number of steps makes, as many as transformers' Trainer makes; and
# the number above which a given number of steps is worth a warning, because the model memorizes its samples.
DEFAULT_PASSES, MANY_PASSES = 3.0, 20
# Samples per step and per forward pass, steps between checkpoints and between logged losses, if neither is given.
BATCH, MICRO_BATCH, SAVE_EVERY, LOG_EVERY = 16, 4, 100, 10
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
# Methods that train a few layers at a time.
SAMPLING_LAYERS = (*DRAW_BY_SCORES, "lisa")
# Method -> settings of the sampling that it fixes.
FIXED: dict[str, dict[str, Any]] = {"lisa": {"rank": None, "floor": 1.0, "train_embeddings": True}}
_OF_SAMPLING = tuple(name for name in OwLoreSettings.__dataclass_fields__ if name not in ("seed", *FIELDS))
# Method -> settings of the sampling that have no effect; `methods.check_method` has those of adapters of OwLore.
_UNUSED = {"galore": ("n_active", "floor", "deselected"), "lora": _OF_SAMPLING, "full": _OF_SAMPLING}


@checked
@dataclass
class TrainingSettings:
    """Training by one of the methods in `METHODS`."""

    method: str = field(
        default=DefaultName("owlore"),
        metadata={
            "help": "which weights are trained. "
            + "; ".join(f"{name}: {weights}" for name, weights in METHODS.items()),
            "choices": list(METHODS),
        },
    )
    score: str = field(
        default=DefaultName("owl"), metadata={"help": "owlore, owlore-peft: score by which layers are sampled"}
    )
    threshold: float = field(
        default=DefaultNumber(13.0),
        metadata={"help": "score owl: outliers are |W_ij| ||X_j|| above this multiple (M) of the mean (paper: 13)"},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate, after a warm-up over a tenth of the steps; default: "
            + ", ".join(f"{rate:g} ({method})" for method, rate in LEARNING_RATES.items())
        },
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": f"number of optimizer steps; default: {DEFAULT_STEPS}, or fewer if these are more than --passes "
            "passes over the samples"
        },
    )
    passes: float = field(
        default=DefaultNumber(DEFAULT_PASSES),
        kw_only=True,  # it is newer than the fields behind it, which keep their places
        metadata={"help": "maximum number of passes over the training samples; refused if the number of steps is set"},
    )
    batch_size: int = following(
        f"samples per optimizer step, of one or more forward passes; default: {BATCH}, rounded up to a "
        "multiple of --micro-batch-size"
    )
    micro_batch_size: int = following(
        f"samples per forward pass; default: {MICRO_BATCH}, or the largest number below it that divides --batch-size"
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens per sample"})
    eval_samples: int = field(
        default=32,
        metadata={"help": "number of samples at the end of the text that are held out for measuring perplexity"},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "norm that gradients are clipped to; 0: no clipping"})
    checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in the backward pass: less memory, more time"}
    )
    bf16: bool = field(default=False, metadata={"help": "train under bfloat16 autocast"})
    lora_rank: int = field(
        default=Default(16), metadata={"help": "lora: rank of the adapters; a higher rank trains more weights"}
    )
    save_every: int = following(
        f"steps between the checkpoints that an interrupted run resumes from; default: {SAVE_EVERY}, rounded down to a "
        "multiple of --log-every"
    )
    log_every: int = following(
        f"steps between logged losses; default: {LOG_EVERY}, or the largest number below it that divides --save-every"
    )

    def __post_init__(self) -> None:
        for name, valid in (("method", METHODS), ("score", SCORES)):
            check_choice(name, getattr(self, name), valid)
        check_least(self, steps=1, batch_size=1, micro_batch_size=1, sequence_length=1, eval_samples=1, lora_rank=1)
        check_least(self, save_every=1, log_every=1)
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
        """Number of optimizer steps."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def resolved(self) -> dict[str, Any]:
        """All settings, with defaults filled in; `passes` is left out, since it only sets the number of steps."""
        told = {**asdict(self), "learning_rate": self.rate, "steps": self.total_steps}
        del told["passes"]
        return told

    @property
    def follows_samples(self) -> bool:
        """Whether the number of steps depends on the number of samples."""
        return self.steps is None


Trained = TypeVar("Trained", bound=TrainingSettings)


def for_samples(settings: Trained, samples: int, begun: int | None = None) -> Trained:
    """The settings with a number of steps that suits the number of training samples; warns if there are few samples.

    Args:
        settings: the user's.
        samples: windows to train on.
        begun: number of steps with which an interrupted run began, if this one resumes it.

    Raises:
        ValueError: one step alone would pass over the samples more than `MANY_PASSES` times.
    """
    # Trainer holds all micro batches of a step in memory, and the first step might never end.
    if settings.batch_size > max(MANY_PASSES * samples, BATCH):
        raise ValueError(
            f"batch_size: expected at most {MANY_PASSES} times the {samples} training samples, got "
            f"{settings.batch_size}; use a smaller --batch-size or a longer text"
        )
    if settings.follows_samples:
        most = max(1, math.ceil(settings.passes * samples / settings.batch_size))
        steps = begun or min(DEFAULT_STEPS, most)
        if steps < DEFAULT_STEPS:
            logger.warning(
                "steps: %d instead of the default %d: %g passes over the %d training samples; use --passes or --steps "
                "for more or fewer",
                steps,
                DEFAULT_STEPS,
                round(steps * settings.batch_size / samples, 1),
                samples,
            )
        return replace(settings, steps=steps)
    warn_of_passes(settings.total_steps, settings.total_steps * settings.batch_size / samples, samples)
    return settings


def warn_of_passes(steps: int, passes: float, samples: int) -> None:
    """Warns before a training that passes over its few samples many times."""
    if passes > MANY_PASSES:
        logger.warning(
            "steps: %d are %d passes over the %d training samples, which the model will memorize; use fewer steps or a "
            "longer text",
            steps,
            round(passes),
            samples,
        )


def warn_of_one_draw(settings: TrainingSettings, sampling: OwLoreSettings, n_layers: int) -> None:
    """Warns before a training that is too short to sample layers a second time."""
    sampled = settings.method in SAMPLING_LAYERS and sampling.n_active < n_layers
    if sampled and settings.total_steps <= sampling.interval:
        logger.warning(
            "interval: layers are sampled once in %d steps, so that %d of %d layers are trained; a lower --interval "
            "(now %d) or more steps train others too",
            settings.total_steps,
            sampling.n_active,
            n_layers,
            sampling.interval,
        )


def _largest_divisor(number: int, most: int) -> int:
    """The largest number up to `most` that divides another one."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


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


def check_effects(settings: TrainingSettings, sampling: OwLoreSettings, scores: Any) -> None:
    """Checks that nothing is set that has no effect with the method, or beside another setting.

    Raises:
        ValueError: scores, their file or settings of a score for a method that does not sample layers by scores,
            settings of another method, settings that another one overrides, or a seed that Trainer does not accept.
    """
    check_seed(sampling.seed, 0, 2**32 - 1)  # the range of Trainer
    method, options = settings.method, options_of(settings)
    if method not in DRAW_BY_SCORES:
        unscored = f"{method}, which does not sample layers by scores"
        if scores is not None:
            raise ValueError(f"scores: expected none with {unscored}, got {shown(scores)}")
        check_effect(settings, ("score", *options), unscored)
    if scores is not None:
        check_effect(settings, ("score", *options), COMPUTED)
    unused = [name for name in options if name not in SCORES[settings.score].settings]
    check_effect(settings, unused, f"score {settings.score}, which does not depend on it")
    if method != "lora":
        check_effect(settings, ["lora_rank"], f"{method}, which trains no adapters of LoRA")
    if not settings.follows_samples:
        check_effect(settings, ["passes"], "a number of steps or tokens")
    _check_sampling(method, sampling)


def _check_sampling(method: str, sampling: OwLoreSettings) -> None:
    """Checks that no setting of the sampling is set that the method does not use."""
    for name in given(sampling, FIXED.get(method, {})):
        if getattr(sampling, name) != FIXED[method][name]:
            raise ValueError(f"{name}: expected {FIXED[method][name]} with {method}, got {getattr(sampling, name)!r}")
    if method == "lora":
        check_effect(sampling, ["rank"], "lora, whose rank is lora_rank")
    check_effect(sampling, _UNUSED.get(method, ()), f"{method}, which does not use it")
    if FIXED.get(method, {}).get("rank", sampling.rank) is None:
        check_effect(sampling, ["scale"], "full rank, in which updates are not scaled")
