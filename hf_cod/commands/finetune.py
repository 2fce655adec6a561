"""hf-cod finetune MODEL --text TEXT: goes on training a model, a few layers at a time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_cod.calibration import Batch, TextSettings, load_texts
from hf_cod.commands.diagnose import require_plots
from hf_cod.commands.finetune_memory import EstimateSettings, estimate, in_gigabytes, print_estimates
from hf_cod.commands.settings import SettingsParser, default_directory, model_title
from hf_cod.commands.terminal import print_report
from hf_cod.decoder_layers import find_decoder_layers
from hf_cod.diagnostics.running import evaluation_mode
from hf_cod.evaluation import perplexity
from hf_cod.files import write_json
from hf_cod.finetuning import LayerSampler, OwLoreAdamW, OwLoreSettings
from hf_cod.finetuning.methods import METHODS
from hf_cod.loading import ModelSettings, load_model
from hf_cod.pretraining import PackedText, last_checkpoint, pack
from hf_cod.report import RunReport, environment, format_number
from hf_cod.scores import METHODS as SCORES
from hf_cod.scores import LayerScores, score_layers

SETTINGS, TRAINER_STATE = "settings.json", "trainer_state.json"
SCORED_SAMPLES = 16


@dataclass
class FinetuneSettings:
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
        for name in ("steps", "batch_size", "micro_batch_size", "sequence_length", "eval_samples", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: expected batch_size {self.batch_size} to be a multiple of it, got "
                f"{self.micro_batch_size}"
            )
        if self.save_every % self.log_every:
            raise ValueError(f"save_every: expected a multiple of log_every ({self.log_every}), got {self.save_every}")


@dataclass
class FinetuneOutput:
    """What is read beside the model, and where results go."""

    scores: str | None = field(default=None, metadata={"help": "scores.json of hf-cod score, instead of scoring anew"})
    output: str | None = field(
        default=None, metadata={"help": "directory for model, report, checkpoints; default: hf-cod-finetune-MODEL"}
    )
    plots: bool = field(default=True, metadata={"help": "draw the pictures (needs matplotlib)"})


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FinetuneSettings, OwLoreSettings, EstimateSettings, FinetuneOutput],
        prog="hf-cod finetune",
        description="Trains a model on with text, by default a few layers at a time (OwLore), and writes a model that "
        "from_pretrained loads. Interrupted, the same command goes on where it stopped.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, sampling, told, files, rest = parser.parse(arguments)
    if told.estimate:
        print_estimates(rest.model, loading, settings, sampling, told)
        return 0
    directory = Path(files.output or default_directory("finetune", rest.model))
    _claim(directory, {"model": rest.model, **asdict(loading), **asdict(text), **asdict(settings), **asdict(sampling)})
    if files.plots:
        require_plots()
    report = run(rest.model, loading, text, settings, sampling, files.scores, directory)
    if files.plots:
        report.plot(directory)
    report.save(directory)
    print_report(report)
    print(f"\nmodel written to {(directory / 'model').resolve()}")
    return 0


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: FinetuneSettings,
    sampling: OwLoreSettings,
    scores_file: str | None,
    directory: Path,
) -> RunReport:
    """Measures, trains, measures again, saves."""
    model, tokenizer = load_model(source, loading)
    if tokenizer is None:
        raise ValueError(f"model: expected a model with a tokenizer, got {source!r}; use hf_cod.owlore with Trainer")
    windows = pack(tokenizer, load_texts(text), settings.sequence_length)
    if len(windows) < settings.eval_samples + 1:
        raise ValueError(
            f"text: expected more than the {settings.eval_samples} windows of {settings.sequence_length} tokens that "
            f"are held out, got {len(windows)}; give a longer text, or fewer --eval-samples"
        )
    train, held_out = windows[: -settings.eval_samples].long(), windows[-settings.eval_samples :].long()
    batches = [{"input_ids": part.to(model.device)} for part in held_out.split(settings.micro_batch_size)]
    before = _perplexity(model, batches)
    scores = _scores(model, train, settings, scores_file, directory)
    chosen = METHODS[settings.method]
    rate = chosen.learning_rate if settings.learning_rate is None else settings.learning_rate
    trained: Any
    trained, optimizer = chosen.setup(model, scores, sampling, rate, settings.lora_rank)
    needed = estimate(model.config, settings.method, settings, sampling, loading.trust_remote_code)
    trainer, seconds, used = _train(trained, optimizer, train, settings, sampling.seed, rate, directory)
    lost = _lost_energy(trained)
    whole = trained.merge_and_unload() if chosen.adapters else trained
    after = _perplexity(whole, batches)
    whole.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    told = {"model": source, **asdict(text), **asdict(settings), **asdict(sampling), "learning_rate": rate}
    figures = {
        "perplexity": {"before": before, "after": after},
        "seconds_a_step": seconds,
        "memory": {"used": used, "estimate": needed.total, "estimate_parts": needed.parts()},
        **({} if lost is None else {"lost_energy": lost}),
    }
    return _report(trainer, told, scores, figures, model_title(source))


def _claim(directory: Path, wanted: dict[str, Any]) -> None:
    """Makes the directory this run's; refuses that of another one, or of a finished one."""
    if (directory / "report.json").exists():
        raise ValueError(f"output: expected a new directory, or that of an interrupted run, got {str(directory)!r}")
    note = directory / SETTINGS
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    for name, value in wanted.items():
        if found is not None and found.get(name) != value:
            raise ValueError(
                f"{name}: expected {found.get(name)!r}, with which the run in {str(directory)!r} began, got {value!r}; "
                "name another --output"
            )
    if found is None:
        write_json(note, wanted)


def _scores(
    model: Any, windows: torch.Tensor, settings: FinetuneSettings, file: str | None, directory: Path
) -> LayerScores | None:
    """Of the model before it is trained; kept, because a resumed run must draw by the same ones."""
    if not METHODS[settings.method].needs_scores:
        return None
    kept = directory / "scores.json"
    if file is not None or kept.is_file():
        return LayerScores.load(file or kept)
    few = windows[:SCORED_SAMPLES].split(settings.micro_batch_size)
    batches = [{"input_ids": part.to(model.device)} for part in few]
    scores = score_layers(
        model, method=settings.score, batches=batches, show_progress=True, threshold=settings.threshold
    )
    scores.save(kept)
    return scores


def _train(
    model: Any,
    optimizer: Any,
    windows: torch.Tensor,
    settings: FinetuneSettings,
    seed: int,
    rate: float,
    directory: Path,
) -> tuple[Any, float, int | None]:
    """Trains, or goes on training; the Trainer, the seconds a step and the bytes that one took."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    from hf_cod.finetuning.memory_callback import MemoryCallback

    # Named only where it is used: later versions deprecate the name.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        train_sampling_strategy="sequential",  # the data set has its order
        learning_rate=rate,
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
        use_cpu=model.device.type == "cpu",
        **checkpointing,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=PackedText(windows, settings.steps * settings.batch_size, seed),
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[memory := MemoryCallback()],
    )
    checkpoint = last_checkpoint(directory, TRAINER_STATE)
    begun = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = (time.perf_counter() - start) / max(1, settings.steps - begun)
    return trainer, seconds, memory.bytes_used()


def _perplexity(model: Any, batches: Sequence[Batch]) -> float:
    with evaluation_mode(find_decoder_layers(model)):
        return perplexity(model, batches)


def _report(
    trainer: Any,
    told: dict[str, Any],
    scores: LayerScores | None,
    figures: dict[str, Any],
    name: str,
) -> RunReport:
    log = trainer.state.log_history
    results = {"curve": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry], **figures}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    layers: dict[str, list[Any]] = {} if scores is None else {"score": scores.values}
    if isinstance(optimizer, OwLoreAdamW):
        layers["trained"] = _steps_of_layers(optimizer.sampler, told["steps"], optimizer.settings.interval)
    before, after = (format_number(figures["perplexity"][key]) for key in ("before", "after"))
    parameter = next(trainer.model.parameters())
    return RunReport(
        kind="finetune",
        model=name,
        settings=told,
        environment=environment(parameter.device, parameter.dtype),
        layers=layers,
        results=results,
        summary=[
            f"Perplexity goes from {before} to {after} on {told['eval_samples']} held-out samples, after "
            f"{told['steps']} steps by {told['method']} (learning rate {told['learning_rate']:g}, "
            f"{format_number(figures['seconds_a_step'])} s a step).",
            _told_memory(figures["memory"]),
            *([_told_lost(figures["lost_energy"])] if "lost_energy" in figures else []),
        ],
    )


def _lost_energy(trained: Any) -> dict[str, float] | None:
    """Of OwLore's adapters, the share of squares that folding cut off: mean and largest over matrices."""
    ask = getattr(trained, "lost_energy", None)
    if ask is None:
        return None
    found = [*ask().values()]
    return {"mean": sum(found) / len(found), "largest": max(found)}


def _told_lost(lost: dict[str, float]) -> str:
    return (
        f"Folding what adapters had learnt cut off {lost['mean']:.2%} of its squares on average, {lost['largest']:.2%} "
        "in the worst matrix."
    )


def _told_memory(memory: dict[str, Any]) -> str:
    expected = f"{in_gigabytes(memory['estimate'])} GB were expected at most"
    if memory["used"] is None:
        return f"Memory was not counted, in less than two steps; {expected}."
    return f"A step needed {in_gigabytes(memory['used'])} GB of memory at its peak; {expected}."


def _steps_of_layers(sampler: LayerSampler, steps: int, interval: int) -> list[int]:
    """How many steps each layer trained."""
    found = [0] * len(sampler.probabilities)
    for first in range(0, steps, interval):
        for layer in sampler.draw(first // interval):
            found[layer] += min(interval, steps - first)
    return found
