"""One training by any of the methods, on packed text, by Trainer: what `hf-cod finetune` and `heal` share."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.decoder_layers import unwrap
from hf_cod.files import write_json
from hf_cod.finetuning.methods import METHODS
from hf_cod.finetuning.owlore import OwLoreAdamW
from hf_cod.finetuning.settings import OwLoreSettings
from hf_cod.scores import METHODS as SCORES
from hf_cod.scores import LayerScores, score_layers

SETTINGS, SCORES_FILE, TRAINER_STATE = "settings.json", "scores.json", "trainer_state.json"
SCORED_SAMPLES = 16


@dataclass
class TrainingSettings:
    """How a model is trained on."""

    method: str = field(default="owlore", metadata={"help": "what trains", "choices": list(METHODS)})
    score: str = field(default="owl", metadata={"help": "owlore: the score that layers are drawn by"})
    threshold: float = field(default=13.0, metadata={"help": "owlore: M of the score owl (paper: 13)"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak, after a warm-up over a tenth of the steps; default: the method's"}
    )
    steps: int = field(default=300, metadata={"help": "optimizer steps"})
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
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
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate


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


@dataclass(frozen=True)
class Training:
    """What one training, or the rest of one, left.

    Attributes:
        curve: (step, loss) as it was logged, also before an interruption.
        seconds: of a step.
        memory: bytes at the peak of a step; None where fewer than two were made.
        trained: of each layer the steps that it trained, where layers were drawn.
    """

    curve: list[list[float]]
    seconds: float
    memory: int | None
    trained: list[int] | None


def claim(directory: Path, wanted: dict[str, Any]) -> None:
    """Makes the directory this run's; what was noted of it before stays noted.

    A run that ended before its first checkpoint has left nothing to go on from: other settings take its place.

    Raises:
        ValueError: it is that of another run, or of a finished one, or a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(directory)!r}")
    if (directory / "report.json").exists():
        raise ValueError(
            f"output: expected a new directory, or that of an interrupted run, got {str(directory)!r}, whose run is "
            f"finished (its model is in {str(directory / 'model')!r})"
        )
    note = directory / SETTINGS
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    changed = [name for name, value in wanted.items() if name in found and found[name] != value]
    if changed and any(directory.glob("checkpoint-*")):
        name = changed[0]
        raise ValueError(
            f"{name}: expected {found[name]!r}, with which the run in {str(directory)!r} began, got {wanted[name]!r}; "
            "name another --output"
        )
    if changed:
        (directory / SCORES_FILE).unlink(missing_ok=True)
    if changed or not wanted.keys() <= found.keys():
        write_json(note, {**found, **wanted})


def split_windows(windows: Tensor, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Windows to train on and, from the text's end, to measure on.

    Raises:
        ValueError: too few for both.
    """
    if len(windows) < settings.eval_samples + 1:
        raise ValueError(
            f"text: expected more than the {settings.eval_samples} windows of {settings.sequence_length} tokens that "
            f"are held out, got {len(windows)}; give a longer text, or fewer --eval-samples"
        )
    return windows[: -settings.eval_samples].long(), windows[-settings.eval_samples :].long()


def scores_to_draw_by(
    model: Any, windows: Tensor, settings: TrainingSettings, file: str | None, directory: Path
) -> LayerScores | None:
    """Of the model before it is trained; kept, because a resumed run must draw by the same ones.

    Layers whose removal or pruning helped count as 0: they are drawn as often as the floor says.

    Raises:
        ValueError: a file of other scores than the run began with, or one that cannot be read.
    """
    if not METHODS[settings.method].needs_scores:
        return None
    kept = directory / SCORES_FILE
    if file is not None:
        given = LayerScores.load(file)
        if kept.is_file() and LayerScores.load(kept) != given:
            raise ValueError(f"scores: expected those that the run in {str(directory)!r} began with, got {file!r}")
        given.save(kept)
        return given
    if kept.is_file():
        return LayerScores.load(kept)
    few = windows[:SCORED_SAMPLES].split(settings.micro_batch_size)
    batches = [{"input_ids": part.to(model.device)} for part in few]
    scores = score_layers(
        model, method=settings.score, batches=batches, show_progress=True, threshold=settings.threshold
    )
    scores = replace(scores, values=[max(0.0, value) for value in scores.values])
    scores.save(kept)
    return scores


def train(
    model: Any,
    optimizer: Any,
    windows: Tensor,
    settings: TrainingSettings,
    seed: int,
    directory: Path,
    *,
    make_trainer: Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
    beside: Sequence[nn.Module] = (),
) -> Training:
    """Trains, or goes on training, exactly as if it had not been interrupted.

    Args:
        model: what a method's setup made, on its device.
        optimizer: Trainer's optimizer_cls_and_kwargs, or None for its own.
        windows: (N, T) token ids.
        settings: of the training.
        seed: of the order of the windows.
        directory: for checkpoints.
        make_trainer: called as transformers' Trainer; None: that.
        callbacks: of Trainer.
        beside: other models in memory, whose weights count, too.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last step is saved.
    """
    from transformers import Trainer, default_data_collator

    from hf_cod.finetuning.interruption import SaveOnInterrupt
    from hf_cod.finetuning.memory_callback import MemoryCallback
    from hf_cod.pretraining import PackedText, last_checkpoint

    config: Any = unwrap(model).config
    caches = getattr(config, "use_cache", None)
    trainer = (make_trainer or Trainer)(
        model=model,
        args=_arguments(settings, seed, directory, model.device),
        train_dataset=PackedText(windows, settings.steps * settings.batch_size, seed),
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[memory := MemoryCallback(beside), interrupt := SaveOnInterrupt(), *callbacks],
    )
    checkpoint = last_checkpoint(directory, TRAINER_STATE)
    begun = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        memory.close()
        interrupt.close()
        if caches is not None:
            config.use_cache = caches  # Trainer turns it off, and the model would be saved like that
    if interrupt.asked and trainer.state.global_step < settings.steps:
        raise KeyboardInterrupt
    seconds = (time.perf_counter() - start) / max(1, settings.steps - begun)
    curve = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    made = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trained = _steps_of_layers(made, settings.steps) if isinstance(made, OwLoreAdamW) else None
    return Training(curve, seconds, memory.bytes_used(), trained)


def _arguments(settings: TrainingSettings, seed: int, directory: Path, device: torch.device) -> Any:
    from transformers import TrainingArguments

    # Named only where it is used: later versions deprecate the name.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.checkpointing else {}
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        train_sampling_strategy="sequential",  # the data set has its order
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 10),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=seed,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=device.type == "cpu",
        **checkpointing,
    )


def _steps_of_layers(optimizer: OwLoreAdamW, steps: int) -> list[int]:
    """How many steps each layer trained."""
    interval = optimizer.settings.interval
    found = [0] * len(optimizer.sampler.probabilities)
    for first in range(0, steps, interval):
        for layer in optimizer.sampler.draw(first // interval):
            found[layer] += min(interval, steps - first)
    return found
