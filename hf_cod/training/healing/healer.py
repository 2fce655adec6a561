"""`heal`: distillation of a teacher into a compressed student."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.report import RunReport
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer
from hf_cod.layers.checks import check_length, pruned_matrices
from hf_cod.layers.devices import check_in_memory
from hf_cod.layers.fingerprints import digest_batches
from hf_cod.layers.finished_layers import fingerprint_of_work
from hf_cod.layers.modes import checkpointing_restored, for_one_thread, gradients_restored, modes_restored
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.healing.healed import healing_report
from hf_cod.training.healing.masked_adapters import adapted_weight, lora_layers, mask_forward, merge_masked
from hf_cod.training.healing.objective import Objective
from hf_cod.training.healing.pair import check_pair, check_tokenizers
from hf_cod.training.healing.settings import HealFields, HealSettings
from hf_cod.training.healing.zeros import kept_at_zero
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import METHODS
from hf_cod.training.runs.run_directory import begun_steps, claim, half_checkpoints, lost_checkpoints
from hf_cod.training.runs.trainer import Training, check_one_process, scores_to_draw_by, train
from hf_cod.training.runs.training_data import split_windows
from hf_cod.training.runs.training_settings import check_effects, for_samples, warn_of_one_draw


@renamed(labels="label_weight", hidden="hidden_weight")
@for_one_thread
@checked
def heal(
    student: nn.Module,
    teacher: nn.Module,
    data: Tensor | Texts | None = None,
    settings: HealSettings | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    teacher_tokenizer: Tokenizer = None,
    held_out: Tensor | None = None,
    sampling: OwLoreSettings | None = None,
    scores: LayerScores | str | Path | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    **fields: Unpack[HealFields],
) -> RunReport:
    """Trains a compressed student in place to predict what its teacher predicts, to recover lost quality.

    As in Minitron (arXiv 2407.14679), the default loss is distillation alone: `functional.distillation.logit_loss`.
    `settings.hidden_weight` adds `hidden_loss`, mean over layers. The compression is preserved: zeros of pruned
    matrices (of at least 1 % of a matrix) stay exactly 0, factors keep their ranks, narrow layers keep their widths.
    The teacher is not changed.

    The report's `results` hold `curve` (step, loss), `perplexity` of "teacher", "before" and "after", `recovered_share`
    (the recovered share of the lost log-perplexity; None if none was lost), `memory_bytes`, `layer_bytes` and
    `layer_weights` of "teacher" and "healed", `tokens`, `seconds_a_step` and `training_memory` (`used_bytes`: peak of
    a step, including the teacher; None after less than two steps). Its `layers` hold `trained` (steps), `score` and
    `teacher_layer`, as far as they apply.

    Args:
        student: a causal language model with weights in floating point.
        teacher: a causal language model with the same vocabulary; of any dtype, quantized or not, on any device.
        data: windows of token ids (N, T), or the same as `texts`.
        settings: `HealSettings`, instead of single fields; default: `HealSettings()`.
        batches: instead of `data`: dicts with windows of token ids, without padding; `token_batches` makes them from
            texts.
        tokenizer: the student's tokenizer, for texts.
        texts: instead of `data`, with `tokenizer`: text, list of texts, `datasets` column, or any iterable of strings,
            which is cut completely into windows of `settings.sequence_length`.
        teacher_tokenizer: if given, it is compared with the student's.
        held_out: windows to measure perplexity on (N, T); default: the last `settings.eval_samples` of the data.
        sampling: settings of methods that sample layers.
        scores: `LayerScores` or their file, to sample layers by, instead of scoring the student.
        output: directory for checkpoints: the same call with the same unhealed student resumes an interrupted run, and
            ends with the same bits. None: a temporary directory.
        name: the student's name in the report.
        **fields: fields of `HealSettings` by name: method, tokens, steps, learning_rate, hidden_weight, ...

    Raises:
        ValueError: a student and a teacher that do not match, other work in `output`, too little text, bad settings,
            several processes.
        ImportError: adapters without peft.
    """
    settings, sampling = resolve(heal, HealSettings, settings, fields), sampling or OwLoreSettings()
    check_one_process()
    mine, theirs, matching = check_pair(student, teacher, settings)
    if teacher_tokenizer is not None:
        if tokenizer is None:
            raise ValueError("tokenizer: expected the student's tokenizer with teacher_tokenizer, got none")
        check_tokenizers(tokenizer, teacher_tokenizer)
    check_effects(settings, sampling, scores)
    for stack in (mine, theirs):
        check_in_memory(stack.model)
        check_length(stack.model, settings.sequence_length)
    data = _one_of(data, batches, texts)
    windows, held_out = _windows(data, tokenizer, held_out, settings, int(mine.config.vocab_size))
    settings = for_samples(settings, len(windows), begun_steps(Path(output)) if output else None)
    warn_of_one_draw(settings, sampling, len(mine))
    objective = Objective(
        mine,
        theirs,
        settings.temperature,
        settings.label_weight,
        settings.hidden_weight,
        matching.layers if matching else (),
    )
    with evaluation_mode(theirs), _directory(output) as directory:
        claim(directory, _work(directory, student, teacher, windows, settings, sampling))
        found = {"teacher": _perplexity(theirs, held_out, settings), "before": _perplexity(mine, held_out, settings)}
        chosen = scores_to_draw_by(student, windows, settings, scores, directory)
        lasting = output is not None
        training = _train(student, objective, chosen, windows, settings, sampling, directory, lasting)
    found["after"] = _perplexity(mine, held_out, settings)
    layers: dict[str, list[Any]] = {} if chosen is None else {"score": chosen.values}
    layers |= {} if training.trained is None else {"trained": training.trained}
    layers |= {} if matching is None else {"teacher_layer": matching.layers}
    return healing_report(mine, theirs, training, settings, sampling, found, layers, matching, name)


@contextmanager
def _directory(output: str | Path | None) -> Iterator[Path]:
    """A directory for the run, locked against other writers; a temporary one if `output` is None."""
    if output is None:
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside)
    else:
        with OutputDirectory(output, half=half_checkpoints, lost=lost_checkpoints) as directory:
            yield directory.path


def _one_of(data: Tensor | Texts | None, batches: Sequence[Batch] | None, texts: Texts | None) -> Tensor | Texts:
    """The argument that holds the data; windows of batches."""
    given = {"data": data, "batches": batches, "texts": texts}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"data: expected windows, batches, or tokenizer and texts, got {' and '.join(names) or 'none of them'}"
        )
    if batches is None:
        return texts if data is None else data  # type: ignore[return-value]
    return _windows_of(batches)


def _windows_of(batches: Sequence[Batch]) -> Tensor:
    """(N, T): the samples of batches, which must be windows: of one length, without padding and other labels."""
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    for number, batch in enumerate(batches):
        if "input_ids" not in batch or "labels" in batch:
            raise ValueError(f"batches: expected input_ids without labels, got {', '.join(batch)} in batch {number}")
        alike = batch["input_ids"].shape[-1] == batches[0]["input_ids"].shape[-1]
        if not alike or ("attention_mask" in batch and not batch["attention_mask"].all()):
            raise ValueError(
                f"batches: expected samples of one length without padding, got others in batch {number}; token_batches "
                "cuts such samples unless pack is False"
            )
    return torch.cat([batch["input_ids"] for batch in batches])


def _windows(
    data: Tensor | Texts, tokenizer: Any, held_out: Tensor | None, settings: HealSettings, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Windows to train on, and to measure on."""
    if not isinstance(data, Tensor):
        if tokenizer is None:
            raise ValueError("tokenizer: expected the student's tokenizer for texts, got none")
        from hf_cod.io.packing import pack

        data = pack(tokenizer, [data] if isinstance(data, str) else data, settings.sequence_length)
    _check_windows("data", data, settings.sequence_length, vocabulary)
    if held_out is None:
        return split_windows(data, settings)
    _check_windows("held_out", held_out, settings.sequence_length, vocabulary)
    return data.long(), held_out.long()


def _check_windows(field: str, windows: Tensor, length: int, vocabulary: int) -> None:
    """Checks shape, dtype and token ids of windows before they are used."""
    if windows.dim() != 2 or windows.shape[1] != length or windows.is_floating_point() or not len(windows):
        raise ValueError(
            f"{field}: expected token ids of shape (windows, {length}), by settings.sequence_length, with at least one "
            f"window, got {windows.dtype} {tuple(windows.shape)}"
        )
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= vocabulary:
        raise ValueError(f"{field}: expected the student's token ids, 0 to {vocabulary - 1}, got {least} to {most}")


def _work(
    directory: Path,
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    settings: HealSettings,
    sampling: OwLoreSettings,
) -> dict[str, Any]:
    """The identity of this run: settings, models and text."""
    return {
        **settings.resolved(),
        **asdict(sampling),
        "student's weights": fingerprint_of_work(directory, student, None),
        "teacher's weights": fingerprint_of_work(directory, teacher, None),
        "windows": digest_batches([{"input_ids": windows}]),
    }


def _train(
    student: Any,
    objective: Objective,
    scores: Any,
    windows: Tensor,
    settings: HealSettings,
    sampling: OwLoreSettings,
    directory: Path,
    lasting: bool,
) -> Training:
    from hf_cod.training.healing.distillation_trainer import AfterEachStep, DistillationTrainer

    how = METHODS[settings.method]
    zeros = pruned_matrices(objective.student)
    with _left_as_it_was(student), kept_at_zero([] if how.adapters else zeros) as set_back:
        trained, optimizer = how.setup(student, scores, sampling, settings.rate, settings.lora_rank)
        masked = _mask(student, zeros) if how.adapters else []
        try:
            training = train(
                trained,
                optimizer,
                windows,
                settings,
                sampling.seed,
                directory,
                make_trainer=partial(DistillationTrainer, objective),
                callbacks=[] if how.adapters else [AfterEachStep(set_back)],
                beside=[objective.teacher.model],
                lasting=lasting,
            )
            if how.adapters:
                _merge(trained, masked)
        finally:
            if how.adapters:
                _take_away(trained, student)
    return training


def _mask(student: nn.Module, zeros: Sequence[Tensor]) -> list[Any]:
    """The adapters on matrices with zeros; their forward pass is masked from here on."""
    with_zeros = {id(p) for p in zeros}
    if not with_zeros:
        return []
    found = [adapter for adapter in lora_layers(student) if id(adapted_weight(adapter)) in with_zeros]
    for adapter in found:
        mask_forward(adapter)
    return found


def _merge(trained: Any, masked: Sequence[Any]) -> None:
    """Merges all adapters into the weights."""
    special = {id(adapter) for adapter in masked}
    for module in trained.modules():
        if id(module) in special:
            merge_masked(module)
        elif hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()


def _take_away(trained: Any, student: Any) -> None:
    trained.unload()
    if hasattr(student, "peft_config"):
        del student.peft_config


@contextmanager
def _left_as_it_was(student: Any) -> Iterator[None]:
    """Restores modes, gradient flags and checkpointing after the block."""
    with modes_restored(student), gradients_restored(student.parameters()), checkpointing_restored(student):
        yield


def _perplexity(stack: DecoderLayers, windows: Tensor, settings: HealSettings) -> float:
    batches: list[Batch] = [{"input_ids": part} for part in windows.split(settings.micro_batch_size)]
    return held_out_perplexity(stack.model, batches, stack.layers_path)
