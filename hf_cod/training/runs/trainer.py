"""Training by any of the methods on packed text, with Trainer; shared by `hf-cod finetune` and `heal`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from torch import nn

from hf_cod.io.answers import AnswerRows
from hf_cod.io.arguments import shown
from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.layers.devices import to_device
from hf_cod.layers.modes import cache_restored, one_thread
from hf_cod.layers.replicas import processes
from hf_cod.layers.running_averages import averages_kept
from hf_cod.layers.stack import unwrap
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import options_of
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.runs.checkpoint_checksums import RecordChecksums, mark
from hf_cod.training.runs.finite import check_trained
from hf_cod.training.runs.interrupt import SaveOnInterrupt
from hf_cod.training.runs.kept_scores import keep_scores, kept_scores
from hf_cod.training.runs.log_lines import LastRecord, LogLines, TrainingBar
from hf_cod.training.runs.methods import METHODS
from hf_cod.training.runs.training_data import Windows, first_batches
from hf_cod.training.runs.training_settings import TrainingSettings

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

logger = logging.getLogger(__name__)

SCORED_SAMPLES = 16


@dataclass(frozen=True)
class Training:
    """The result of a training run, resumed or not.

    Attributes:
        curve: (step, loss) as logged, including steps before an interruption.
        seconds: seconds per step; None if all steps were made before the run was resumed.
        memory: peak bytes of a step; None after fewer than two steps.
        trained: for each layer, the steps that it trained; None if layers were not sampled.
    """

    curve: list[list[float]]
    seconds: float | None
    memory: int | None
    trained: list[int] | None


def check_one_process() -> None:
    """Rejects several processes before anything is written, because all would write to the same directory.

    Raises:
        ValueError: this is one of several processes.
    """
    count = max(processes(), int(os.environ.get("WORLD_SIZE") or 1))
    if count > 1:
        raise ValueError(_alone(count, "processes; start one"))


def scores_to_draw_by(
    model: Any, windows: Windows, settings: TrainingSettings, given: LayerScores | str | Path | None, directory: Path
) -> LayerScores | None:
    """The given scores or those in the given file, else scores of the model before training.

    They are saved, because a resumed run must sample by the same scores.

    Negative scores (removing or pruning the layer improved the model) count as 0: the floor alone determines how often
    such layers are sampled.

    Raises:
        ValueError: other scores than the run started with, or a file that cannot be read.
    """
    if not METHODS[settings.method].needs_scores:
        return None
    if given is not None:
        scores = given if isinstance(given, LayerScores) else LayerScores.load(given)
        keep_scores(directory, scores, str(shown(given)))
        return scores
    kept = kept_scores(directory)
    if kept is not None:
        keep_scores(directory, kept, "others")
        return kept
    batches = [to_device(batch, model.device) for batch in first_batches(windows, SCORED_SAMPLES, settings)]
    chosen: dict[str, Any] = {name: getattr(settings, name) for name in options_of(settings, settings.score)}
    scores = score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)
    scores = replace(scores, values=[max(0.0, value) for value in scores.values])
    keep_scores(directory, scores, "others of this model")
    return scores


def train(
    model: Any,
    optimizer: Any,
    windows: Windows,
    settings: TrainingSettings,
    seed: int,
    directory: Path,
    *,
    make_trainer: Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
    beside: Sequence[nn.Module] = (),
    lasting: bool = True,
) -> Training:
    """Trains, or resumes training with the same result as an uninterrupted run.

    Args:
        model: the model from a method's setup, on its device.
        optimizer: Trainer's optimizer_cls_and_kwargs, or None for Trainer's default.
        windows: token ids (N, T), or rows of answers.
        settings: settings of the training.
        seed: seed of the order of the windows.
        directory: directory for checkpoints.
        make_trainer: called in place of transformers' Trainer, with its arguments; None: Trainer.
        callbacks: callbacks of Trainer.
        beside: other models in memory, whose weights are counted in `Training.memory`.
        lasting: whether the directory remains after the call, so that checkpoints are saved.

    Raises:
        ValueError: several processes, or several GPUs that Trainer would replicate the model on.
        RuntimeError: the weights are not finite after training.
        KeyboardInterrupt: Ctrl-C or SIGTERM; with `lasting`, a checkpoint of the last step is saved first.
    """
    from transformers import Trainer, default_data_collator

    from hf_cod.io.packing import PackedText
    from hf_cod.training.runs.checkpoint_files import STATE
    from hf_cod.training.runs.checkpoint_of_run import check_of_run
    from hf_cod.training.runs.memory import MemoryCallback
    from hf_cod.training.runs.run_directory import last_checkpoint, last_steps

    saving = [interrupt := SaveOnInterrupt(), RecordChecksums()]
    # Trainer sets use_cache to False, which would be saved with the model.
    with one_thread(model), cache_restored(unwrap(model).config), _own_names(model), averages_kept(model):
        trainer = (make_trainer or Trainer)(
            model=model,
            args=_arguments(settings, seed, directory, model.device, lasting),
            train_dataset=PackedText(windows, settings.total_steps * settings.batch_size, seed),
            data_collator=windows.collate if isinstance(windows, AnswerRows) else default_data_collator,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[memory := MemoryCallback(beside), LastRecord(), *callbacks, *(saving if lasting else [])],
        )
        show_progress(trainer)
        try:
            _check_alone(trainer.args)
            if last_steps(directory):
                trainer.create_optimizer()  # as Trainer does later; checkpoints are compared with it
            checkpoint = last_checkpoint(directory, STATE, partial(check_of_run, trainer))
            begun = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            memory.close()
            interrupt.close()
    if trainer.state.global_step < settings.total_steps:
        interrupt.raise_asked()
    check_trained(model)
    left = settings.total_steps - begun
    seconds = (time.perf_counter() - start) / left if left > 0 else None
    curve = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    made = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trained = _steps_of_layers(made, settings.total_steps) if isinstance(made, OwLoreAdamW) else None
    return Training(curve, seconds, memory.bytes_used(), trained)


def show_progress(trainer: Any) -> None:
    """Shows this package's bar, or a line for each record if bars are off, in place of Trainer's."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    else:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingBar())


@contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Marks checkpoints as ours, and saves them with the model's own names of weights, because Trainer resumes without
    converting names.

    Otherwise the experts of a mixture are saved under the names of published models, and are not loaded.
    """
    before = vars(model).get("save_pretrained")
    # Adapters are saved with their own names.
    options = {} if hasattr(model, "peft_config") else {"save_original_format": False}
    model.save_pretrained = partial(_save_marked, partial(model.save_pretrained, **options))
    try:
        yield
    finally:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before


def _save_marked(save: Callable[..., None], checkpoint: str, *arguments: Any, **options: Any) -> None:
    """Saves the model of a checkpoint, the first of its files, with a mark; also if it is deleted meanwhile."""
    mark(Path(checkpoint))
    save(checkpoint, *arguments, **options)
    mark(Path(checkpoint))


def _arguments(settings: TrainingSettings, seed: int, directory: Path, device: torch.device, lasting: bool) -> Any:
    from transformers import TrainingArguments

    # Passed only if it is used, because later versions deprecate the argument.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.checkpointing else {}
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.total_steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        train_sampling_strategy="sequential",  # the dataset is shuffled already
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
    """Checks that Trainer uses one device, because it takes a micro-batch for each process and GPU.

    A model that is spread over several GPUs counts as one device.
    """
    for count, what in (
        (arguments.world_size, "processes; start one"),
        (arguments.n_gpu, "GPUs; name one in CUDA_VISIBLE_DEVICES"),
    ):
        if count > 1:
            raise ValueError(_alone(count, what))


def _alone(count: int, what: str) -> str:
    return (
        f"device: expected one process and one GPU, or a model spread over several GPUs (auto), got {count} {what}, "
        "or use hf_cod.owlore in a Trainer script"
    )


def _steps_of_layers(optimizer: OwLoreAdamW, steps: int) -> list[int]:
    """Number of steps that each layer trained."""
    interval = optimizer.settings.interval
    found = [0] * len(optimizer.sampler.probabilities)
    for first in range(0, steps, interval):
        for layer in optimizer.sampler.draw(first // interval):
            found[layer] += min(interval, steps - first)
    return found
