"""hf-cod prune MODEL: zeros in a model's matrices, distributed over layers by how much they matter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.cli.compression import (
    CompressionOutput,
    SpreadSettings,
    as_in,
    describe_perplexity,
    load_with_tokenizer,
    measure_perplexity,
    save_results,
    split_text,
    write_results,
)
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.compression.pruning.methods import check_pattern, measure_sparsity
from hf_cod.compression.pruning.pruner import parse_pattern, prune
from hf_cod.compression.pruning.settings import METHODS
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.checks import check_writable
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation, allocate
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import PRUNERS, ScoreSettings
from hf_cod.training.healing.recovery import recover
from hf_cod.training.healing.settings import RecoverySettings

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
        if not self.fixed:
            _plan(LayerScores("", "uniform", [1.0], [1]), self)  # whether budget, spread and group go together

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
class RecoveryOptions:
    """How a pruned model is trained on, as options beside those of pruning."""

    recover: int = field(
        default=0, metadata={"help": "training steps of LoRA after pruning; zeros stay zeros (needs peft)"}
    )
    recover_rank: int = as_in(RecoverySettings, "rank")
    recover_learning_rate: float = as_in(RecoverySettings, "learning_rate")

    def __post_init__(self) -> None:
        for name, least in (("recover", 0), ("recover_rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.recover_learning_rate < math.inf:
            raise ValueError(f"recover_learning_rate: expected a number above 0, got {self.recover_learning_rate}")


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, PruneSettings, RecoveryOptions, CompressionOutput],
        prog="hf-cod prune",
        description="Sets weights of the layers' matrices to zero, more of them in layers that matter less, and writes "
        "a model that from_pretrained loads. Interrupted, the same command goes on where it stopped. The model itself "
        "is never touched. Zeros alone do not make a model faster.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, recovery, files, rest = parser.parse(arguments)
    return write_results(
        "prune", rest.model, files, partial(run, rest.model, loading, text, settings, recovery, files.scores)
    )


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: PruneSettings,
    recovery: RecoveryOptions,
    scores_file: str | None,
    journal: Path,
    output: Path,
) -> RunReport:
    """Measures, prunes, saves, and measures again what was saved; memory never holds two models."""
    scores = None if settings.fixed or scores_file is None else LayerScores.load(scores_file)
    model, tokenizer = load_with_tokenizer(source, loading)
    _check_model(model, settings, scores)
    calibration, evaluation = split_text(model, tokenizer, text, settings)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    if scores is None and not settings.fixed:
        scores = _scores(model, calibration, settings)
    plan: LayerAllocation | str = settings.fixed or ""
    if scores is not None:
        plan = _plan(scores, settings)
    options: dict[str, Any] = {
        "batches": calibration,
        "journal": journal,
        "layers_path": settings.layers_path,
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
    plans = {"allocation.json": plan} if isinstance(plan, LayerAllocation) else {}
    save_results(output, model, tokenizer, scores, plans)
    del model
    saved, _ = load_model(str(output), replace(loading, revision="main"))
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


def _check_model(model: nn.Module, settings: PruneSettings, scores: LayerScores | None) -> None:
    """What can be known to fail before anything is measured."""
    stack = find_decoder_layers(model, settings.layers_path)
    check_writable(stack)
    M = settings.group or (parse_pattern(settings.fixed)[1] if settings.fixed else None)
    if M is not None:
        check_pattern(stack, M)
    if scores is not None:
        scores.check(stack)


def _scores(model: nn.Module, batches: Sequence[Batch], settings: PruneSettings) -> LayerScores:
    chosen = {name: getattr(settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
    if 0 < settings.budget < 1:
        chosen["target"] = settings.budget
    if settings.method in PRUNERS:  # SparseGPT, which is dear to try, is judged by Wanda
        chosen["pruner"] = settings.method
    return score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)


def _plan(scores: LayerScores, settings: PruneSettings) -> LayerAllocation:
    return allocate(scores, "sparsity", settings.budget, settings.spread, group=settings.group)


def _recover(model: nn.Module, batches: Sequence[Batch], settings: PruneSettings, chosen: RecoveryOptions) -> None:
    recover(
        model,
        batches,
        chosen.recover,
        rank=chosen.recover_rank,
        learning_rate=chosen.recover_learning_rate,
        seed=settings.seed,
        layers_path=settings.layers_path,
        show_progress=True,
    )


def _summary(results: dict[str, Any], layers: dict[str, list[Any]]) -> list[str]:
    sentences = [
        f"{results['sparsity']:.2%} of {sum(layers['parameters']):,} weights in the saved model's matrices are zero."
    ]
    return [*sentences, *describe_perplexity(results, "pruned")]
