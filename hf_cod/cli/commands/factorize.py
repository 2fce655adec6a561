"""hf-cod factorize MODEL: matrices as products of two thin ones, with ranks by how much layers or matrices matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.cli.compression import (
    CompressionOutput,
    SpeedSettings,
    SpreadSettings,
    describe_perplexity,
    describe_sizes,
    describe_speed,
    load_with_tokenizer,
    measure_perplexity,
    measured_results,
    save_results,
    speeds_of,
    split_text,
    write_results,
)
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.compression.low_rank.factorizer import factorize
from hf_cod.compression.low_rank.rank_plan import RankPlan
from hf_cod.compression.low_rank.settings import METHODS, RANK_SHARE, WEIGHINGS
from hf_cod.compression.low_rank.spectra import plan_ranks
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation, allocate
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import METHODS as SCORES

DEFAULT_PARAMETERS = 0.8
# These give each matrix a rank, all others each layer a share.
FISHER, SPECTRUM = OF_MATRICES = WEIGHINGS
# These try plans of sparsity, which say little of ranks.
OF_SPARSITY = ("sensitivity", "auto")
CHOICES = (*OF_MATRICES, *(name for name in SCORES if name not in (*OF_MATRICES, *OF_SPARSITY)))


@dataclass
class FactorizeSettings(SpeedSettings, SpreadSettings):
    """What is factorized, and on which samples."""

    method: str = field(
        default="whitened",
        metadata={
            "help": "whitened: outputs change least on the text; plain: entries change least; oats: a sparse matrix "
            "beside the factors, whose zeros hf-cod pack then leaves out"
        },
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "a rank for each matrix, by what its loss costs the model (fisher) or by how much of its output it "
            "loses (spectrum); or a share for each layer by "
            + ", ".join(CHOICES[len(OF_MATRICES) :])
            + f"; default: {FISHER} ({SPECTRUM} by entries, or for want of a loss), for oats, which takes shares "
            "alone, uniform"
        },
    )
    parameters: float | None = field(
        default=None,
        metadata={"help": f"share of the layers' weights to keep; default: {DEFAULT_PARAMETERS}, or what rank makes"},
    )
    rank: float | None = field(
        default=None,
        metadata={
            "help": "share of full rank to keep, instead, by a score of layers (such as --score angular); what it "
            "would enlarge stays whole"
        },
    )
    rank_share: float = field(
        default=RANK_SHARE, metadata={"help": "of the weights that oats keeps, the part in thin factors"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "oats" and self.score is None:
            self.score = "uniform"
        if self.score not in (None, *CHOICES):
            raise ValueError(f"score: expected one of {', '.join(CHOICES)}, got {self.score!r}")
        for name in ("parameters", "rank"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {share}")
        if not 0 < self.rank_share < 1:
            raise ValueError(f"rank_share: expected a share between 0 and 1, got {self.rank_share}")
        if self.method != "oats" and self.rank_share != RANK_SHARE:
            raise ValueError(f"rank_share: expected method oats beside it, got {self.method}")
        if self.method == "oats" and (self.rank is not None or self.score in OF_MATRICES):
            got = self.score if self.rank is None else "rank"
            raise ValueError(f"method: expected parameters and a score of layers for oats, got {got}")
        if self.method == "plain" and self.score == FISHER:
            raise ValueError(f"score: expected {SPECTRUM} or a score of layers for plain, got {FISHER}")
        if self.rank is not None and self.parameters is not None:
            raise ValueError("rank: expected no parameters beside it, got both")

    @property
    def budget(self) -> float:
        """The share of parameters to keep, where that and not the rank is given."""
        return DEFAULT_PARAMETERS if self.parameters is None else self.parameters

    def check_scores(self, scores_file: str | None) -> None:
        """Makes sure that a rank and a spread have scores of layers to follow, from a file if not by name.

        Raises:
            ValueError: they have none.
        """
        given = next((name for name in ("rank", "spread") if getattr(self, name) is not None), None)
        if given is not None and scores_file is None and self.score in (None, *OF_MATRICES):
            raise ValueError(f"{given}: expected a score of layers beside it, got {self.score or 'none'}")


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FactorizeSettings, CompressionOutput],
        prog="hf-cod factorize",
        description="Replaces matrices of the layers by products of two thin ones, and writes a smaller, dense model "
        "that from_pretrained loads where hf_cod is imported, and with trust_remote_code without it; or, by oats, a "
        "model that is smaller once hf-cod pack has left out its zeros. Interrupted, the same command goes on where it "
        "stopped. The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, files, rest = parser.parse(arguments)
    settings.check_scores(files.scores)
    return write_results(
        "factorize", rest.model, files, partial(run, rest.model, loading, text, settings, files.scores)
    )


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: FactorizeSettings,
    scores_file: str | None,
    journal: Path,
    output: Path,
) -> RunReport:
    """Measures, factorizes, saves, and measures again what was saved; memory never holds two models."""
    scores = None if scores_file is None else LayerScores.load(scores_file)
    model, tokenizer = load_with_tokenizer(source, loading)
    if scores is not None:
        scores.check(find_decoder_layers(model, settings.layers_path))
    calibration, evaluation = split_text(model, tokenizer, text, settings)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    speeds = speeds_of({"intact": model}, evaluation, settings)
    scores = scores or _scores(model, calibration, settings)
    plan: LayerAllocation | RankPlan
    options: dict[str, Any] = {"journal": journal, "layers_path": settings.layers_path, "show_progress": True}
    if scores is None:
        batches = calibration if settings.method == "whitened" else None
        plan = plan_ranks(model, settings.budget, settings.score, batches=batches, **options)
    else:
        plan = _plan(scores, settings)
    options |= {"batches": calibration, "rank_share": settings.rank_share}
    if settings.baseline and (scores is None or scores.method != "uniform"):
        factorize(model, _alike(model, settings), settings.method, **options)
        perplexities["uniform"] = measure_perplexity(model, evaluation, settings)
        del model
        model, _ = load_model(source, loading)
    report = factorize(model, plan, settings.method, name=model_title(source), **options)
    name = "rank_plan.json" if isinstance(plan, RankPlan) else "allocation.json"
    save_results(output, model, tokenizer, scores, {name: plan})
    del model
    saved, _ = load_model(str(output), replace(loading, revision="main"))
    perplexities["factorized"] = measure_perplexity(saved, evaluation, settings)
    speeds |= speeds_of({"factorized": saved}, evaluation, settings)
    results = measured_results(report, output, perplexities, speeds, evaluation)
    given = {"score": plan.method, "text": text.text, "scores": scores_file}
    return replace(
        report,
        settings={**asdict(settings), **given, **describe_batches(calibration)},
        layers={**report.layers, **({} if scores is None else {"score": scores.values})},
        results=results,
        summary=[
            *report.summary,
            describe_sizes(results, "factorized"),
            *describe_perplexity(results, "factorized"),
            *describe_speed(results, "factorized"),
        ],
    )


def _scores(model: nn.Module, batches: Sequence[Batch], settings: FactorizeSettings) -> LayerScores | None:
    """None where matrices are scored, not layers."""
    if settings.score is None or settings.score in OF_MATRICES:
        return None
    chosen = {name: getattr(settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
    return score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)


def _plan(scores: LayerScores, settings: FactorizeSettings) -> LayerAllocation:
    if settings.rank is not None:
        return allocate(scores, "rank", settings.rank, settings.spread)
    return allocate(scores, "parameters", settings.budget, settings.spread)


def _alike(model: nn.Module, settings: FactorizeSettings) -> LayerAllocation:
    """The plan that treats all layers alike."""
    scores = score_layers(model, method="uniform", layers_path=settings.layers_path)
    return _plan(scores, replace(settings, score="uniform", spread=None))
