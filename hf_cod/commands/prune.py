"""hf-cod prune MODEL: zeros in a model's matrices, distributed over layers by how much they matter."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.allocation import LayerAllocation, allocate
from hf_cod.calibration import Batch, TextSettings, describe_batches
from hf_cod.commands.compressing import (
    SpreadSettings,
    as_in,
    check_output,
    describe_perplexity,
    load_with_tokenizer,
    measure_perplexity,
    split_text,
)
from hf_cod.commands.diagnose import require_plots
from hf_cod.commands.settings import SettingsParser, default_directory, model_title
from hf_cod.commands.terminal import print_report
from hf_cod.decoder_layers import find_decoder_layers
from hf_cod.evaluation import task_of
from hf_cod.loading import ModelSettings, load_model
from hf_cod.pruning import METHODS, RecoverySettings, measure_sparsity, parse_pattern, prune, recover
from hf_cod.report import RunReport
from hf_cod.scores import METHODS as SCORES
from hf_cod.scores import PRUNERS, LayerScores, ScoreSettings, score_layers

DEFAULT_SPARSITY = 0.5


@dataclass
class PruneSettings(SpreadSettings):
    """What is pruned, and on which samples."""

    method: str = field(default="wanda", metadata={"help": f"which weights go: by {', '.join(METHODS)}"})
    score: str = as_in(ScoreSettings, "method")
    sparsity: float | None = field(
        default=None, metadata={"help": f"share of zeros; default: {DEFAULT_SPARSITY}, or what the pattern makes"}
    )
    pattern: str | None = field(
        default=None,
        metadata={"help": "2:4 keeps 2 of each 4 weights in every layer; N:8 chooses N for each layer by its score"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {self.score!r}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a share in 0..1, got {self.sparsity}")
        if self.fixed and (self.sparsity is not None or self.spread is not None):
            raise ValueError(f"pattern: expected {self.pattern} without sparsity and spread, which follow from it")

    @property
    def fixed(self) -> str | None:
        """The pattern if it is one for all layers."""
        if self.pattern is None or self.group is not None:
            return None
        parse_pattern(self.pattern)
        return self.pattern

    @property
    def group(self) -> int | None:
        """The M of N:M where each layer has its own N."""
        found = re.fullmatch(r"N:(\d+)", self.pattern or "")
        return int(found[1]) if found else None

    @property
    def budget(self) -> float:
        """The sparsity that the layers share."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity


@dataclass
class PruneOutput:
    """What is read beside the model, and where results go."""

    scores: str | None = field(default=None, metadata={"help": "scores.json of hf-cod score, instead of scoring anew"})
    output: str | None = field(
        default=None, metadata={"help": "new directory for model, report and pictures; default: hf-cod-prune-MODEL"}
    )
    plots: bool = field(default=True, metadata={"help": "draw the pictures (needs matplotlib)"})


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, PruneSettings, RecoverySettings, PruneOutput],
        prog="hf-cod prune",
        description="Sets weights of the layers' matrices to zero, more of them in layers that matter less, and writes "
        "a model that from_pretrained loads. Interrupted, the same command goes on where it stopped. The model itself "
        "is never touched. Zeros alone do not make a model faster.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, recovery, files, rest = parser.parse(arguments)
    directory = Path(files.output or default_directory("prune", rest.model))
    check_output(directory, rest.model)
    if files.plots:
        require_plots()
    report = run(rest.model, loading, text, settings, recovery, files.scores, directory)
    if files.plots:
        report.plot(directory)
    report.save(directory)
    shutil.rmtree(directory / "journal", ignore_errors=True)
    print_report(report)
    print(f"\nwritten to {directory.resolve()}")
    return 0


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: PruneSettings,
    recovery: RecoverySettings,
    scores_file: str | None,
    directory: Path,
) -> RunReport:
    """Measures, prunes, saves, and measures again what was saved; memory never holds two models."""
    model, tokenizer = load_with_tokenizer(source, loading)
    calibration, evaluation = split_text(tokenizer, text, settings, task_of(model))
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    scores = None if settings.fixed else _scores(model, calibration, settings, scores_file)
    plan: LayerAllocation | str = settings.fixed or ""
    if scores is not None:
        plan = _plan(scores, settings)
    options: dict[str, Any] = {
        "batches": calibration,
        "journal": directory / "journal",
        "path": settings.layers_path,
        "name": model_title(source),
        "show_progress": True,
    }
    if settings.baseline and scores is not None and scores.method != "uniform":
        alike = replace(scores, values=[1.0] * len(scores.values), method="uniform")
        prune(model, _plan(alike, settings), settings.method, **options)
        perplexities["uniform"] = measure_perplexity(model, evaluation, settings)
        del model
        model, _ = load_model(source, loading)
    report = prune(model, plan, settings.method, **options)
    if recovery.recover:
        perplexities["pruned"] = measure_perplexity(model, evaluation, settings)
        _recover(model, calibration, settings, recovery)
    _save(directory, model, tokenizer, scores, plan)
    del model
    saved, _ = load_model(str(directory), replace(loading, revision="main"))
    perplexities["recovered" if recovery.recover else "pruned"] = measure_perplexity(saved, evaluation, settings)
    layers, results = measure_sparsity(find_decoder_layers(saved, settings.layers_path))
    results |= {"perplexity": perplexities, "evaluation": describe_batches(evaluation)}
    found = {} if scores is None else {"score": scores.values}
    return replace(
        report,
        settings={
            **asdict(settings),
            **asdict(recovery),
            "text": text.text,
            "scores": scores_file,
            **describe_batches(calibration),
        },
        layers={**report.layers, **layers, **found},
        results=results,
        summary=[*_summary(results, layers), *([] if scores is None else scores.remarks)],
    )


def _scores(
    model: nn.Module, batches: Sequence[Batch], settings: PruneSettings, scores_file: str | None
) -> LayerScores:
    if scores_file is not None:
        return LayerScores.load(scores_file)
    chosen = {name: getattr(settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
    if 0 < settings.budget < 1:
        chosen["target"] = settings.budget
    if settings.method in PRUNERS:  # SparseGPT, which is dear to try, is judged by Wanda
        chosen["pruner"] = settings.method
    return score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)


def _plan(scores: LayerScores, settings: PruneSettings) -> LayerAllocation:
    return allocate(scores, "sparsity", settings.budget, settings.spread, group=settings.group)


def _recover(model: nn.Module, batches: Sequence[Batch], settings: PruneSettings, chosen: RecoverySettings) -> None:
    recover(
        model,
        batches,
        chosen.recover,
        rank=chosen.recover_rank,
        learning_rate=chosen.recover_learning_rate,
        seed=settings.seed,
        path=settings.layers_path,
        show_progress=True,
    )


def _save(directory: Path, model: Any, tokenizer: Any, scores: LayerScores | None, plan: LayerAllocation | str) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if scores is not None:
        scores.save(directory / "scores.json")
    if isinstance(plan, LayerAllocation):
        plan.save(directory / "allocation.json")


def _summary(results: dict[str, Any], layers: dict[str, list[Any]]) -> list[str]:
    sentences = [
        f"{results['sparsity']:.2%} of {sum(layers['parameters']):,} weights in the saved model's matrices are zero."
    ]
    return [*sentences, *describe_perplexity(results, "pruned")]
