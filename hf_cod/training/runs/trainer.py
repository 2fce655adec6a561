"""One training by any of the methods, on packed text, by Trainer: what `hf-cod finetune` and `heal` share."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from hf_cod.layers.modes import cache_restored, one_thread
from hf_cod.layers.replicas import processes
from hf_cod.layers.stack import unwrap
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.runs.log_lines import LogLines
from hf_cod.training.runs.methods import METHODS
from hf_cod.training.runs.run_directory import SCORES_FILE
from hf_cod.training.runs.training_settings import TrainingSettings

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
SCORED_SAMPLES = 16


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


def check_one_process() -> None:
    """Before anything is written, refuses a launcher's second process, which would do the same in the same directory.

    Raises:
        ValueError: this is one of several processes.
    """
    count = max(processes(), int(os.environ.get("WORLD_SIZE") or 1))
    if count > 1:
        raise ValueError(_alone(count, "processes; start one"))


def split_windows(windows: Tensor, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Windows to train on and, from the text's end, to measure on.

    Warns where most are held out.

    Raises:
        ValueError: too few for both.
    """
    if len(windows) < settings.eval_samples + 1:
        raise ValueError(
            f"text: expected more than the {settings.eval_samples} windows of {settings.sequence_length} tokens that "
            f"are held out, got {len(windows)}; give a longer text, or fewer --eval-samples"
        )
    left = len(windows) - settings.eval_samples
    if left < settings.eval_samples:
        logger.warning(
            "eval_samples: %d of %d samples are held out, and only %d are trained on; fewer --eval-samples or a longer "
            "text gives more",
            settings.eval_samples,
            len(windows),
            left,
        )
    return windows[:left].long(), windows[left:].long()


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
    lasting: bool = True,
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
        lasting: whether the directory outlives the caller, so that checkpoints are worth their time.

    Raises:
        ValueError: several processes, or several GPUs that Trainer would copy the model to.
        KeyboardInterrupt: Ctrl-C; in a lasting directory a checkpoint of the last step is saved.
    """
    from transformers import Trainer, default_data_collator

    from hf_cod.io.packing import PackedText
    from hf_cod.training.runs.memory import MemoryCallback
    from hf_cod.training.runs.run_directory import last_checkpoint

    interrupt = SaveOnInterrupt()
    # Trainer turns the cache off, and the model would be saved like that.
    with one_thread(model), cache_restored(unwrap(model).config):
        trainer = (make_trainer or Trainer)(
            model=model,
            args=_arguments(settings, seed, directory, model.device, lasting),
            train_dataset=PackedText(windows, settings.total_steps * settings.batch_size, seed),
            data_collator=default_data_collator,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[memory := MemoryCallback(beside), *callbacks, *([interrupt] if lasting else [])],
        )
        if trainer.args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(LogLines())
        checkpoint = last_checkpoint(directory, TRAINER_STATE)
        begun = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        start = time.perf_counter()
        try:
            _check_alone(trainer.args)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            memory.close()
            interrupt.close()
    if interrupt.asked and trainer.state.global_step < settings.total_steps:
        raise KeyboardInterrupt
    seconds = (time.perf_counter() - start) / max(1, settings.total_steps - begun)
    curve = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    made = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trained = _steps_of_layers(made, settings.total_steps) if isinstance(made, OwLoreAdamW) else None
    return Training(curve, seconds, memory.bytes_used(), trained)


def _arguments(settings: TrainingSettings, seed: int, directory: Path, device: torch.device, lasting: bool) -> Any:
    from transformers import TrainingArguments

    # Named only where it is used: later versions deprecate the name.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.checkpointing else {}
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.total_steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        train_sampling_strategy="sequential",  # the data set has its order
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.total_steps // 10),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=seed,
        save_strategy="steps" if lasting else "no",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        report_to="none",
        disable_tqdm=are_progress_bars_disabled() or not sys.stderr.isatty(),
        use_cpu=device.type == "cpu",
        **checkpointing,
    )


def _check_alone(arguments: Any) -> None:
    """Makes sure that a step has the samples that were asked for: Trainer takes a micro-batch for each process and GPU.

    A model that is spread over GPUs is one to it.
    """
    for count, what in (
        (arguments.world_size, "processes; start one"),
        (arguments.n_gpu, "GPUs; name one in CUDA_VISIBLE_DEVICES"),
    ):
        if count > 1:
            raise ValueError(_alone(count, what))


def _alone(count: int, what: str) -> str:
    return (
        f"device: expected one process and one GPU, or a model spread over several (auto), got {count} {what}, "
        "or use hf_cod.owlore with a Trainer of your own"
    )


def _steps_of_layers(optimizer: OwLoreAdamW, steps: int) -> list[int]:
    """How many steps each layer trained."""
    interval = optimizer.settings.interval
    found = [0] * len(optimizer.sampler.probabilities)
    for first in range(0, steps, interval):
        for layer in optimizer.sampler.draw(first // interval):
            found[layer] += min(interval, steps - first)
    return found


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C lets the step end and saves; a second one ends at once.

    For a training in one process and in its main thread, which alone may handle signals; others are left as they are.
    So is a signal that is ignored, as in a job that a script put into the background, and one whose handler Python does
    not know and could not give back.

    Attributes:
        asked: whether the training was ended so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, *others: Any, **about: Any) -> None:
        """Takes the signal over, where that is ours to do."""
        alone = args.world_size == 1 and threading.current_thread() is threading.main_thread()
        if alone and signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN):
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Ends and saves, if that was asked for; the loss is logged, because a resumed training forgets it."""
        if self.asked:
            control.should_log = control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Gives the signal back; to be called behind a training, however it ended."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, *_: Any) -> None:
        self.asked = True
        self.close()
        print("\nstops and saves behind this step; Ctrl-C again: at once", file=sys.stderr, flush=True)
