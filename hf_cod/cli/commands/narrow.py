"""hf-cod narrow MODEL: fewer attention heads and MLP channels, more of them in layers that matter more."""

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
    as_in,
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
from hf_cod.compression.width.narrower import narrow
from hf_cod.compression.width.settings import CHANNEL_MULTIPLE, COMPENSATIONS, METHODS
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.allocation import allocate
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import ScoreSettings


@dataclass
class NarrowSettings(SpeedSettings, SpreadSettings):
    """What is removed, and on which samples."""

    method: str = field(
        default="fluctuation",
        metadata={
            "help": "which heads and channels stay: those whose outputs vary most (fluctuation), that the loss needs "
            "to first order (taylor), or of largest weights (magnitude)"
        },
    )
    compensation: str = field(
        default="least_squares",
        metadata={"help": f"what makes up for the others: {', '.join(COMPENSATIONS)}"},
    )
    score: str = as_in(ScoreSettings, "method")
    parameters: float = field(default=0.8, metadata={"help": "share of the layers' weights to keep"})
    multiple: int = field(default=CHANNEL_MULTIPLE, metadata={"help": "numbers of channels are multiples of this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        tables = (("method", METHODS), ("compensation", COMPENSATIONS), ("score", SCORES))
        for name, table in tables:
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: expected one of {', '.join(table)}, got {getattr(self, name)!r}")
        if not 0 < self.parameters <= 1:
            raise ValueError(f"parameters: expected a share above 0 and at most 1, got {self.parameters}")
        if self.multiple < 1:
            raise ValueError(f"multiple: expected a whole number above 0, got {self.multiple}")


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, NarrowSettings, CompressionOutput],
        prog="hf-cod narrow",
        description="Removes attention heads and MLP channels, more of them in layers that matter less, and writes a "
        "smaller, dense model: a stock one where all layers come out alike and their family can say it, else one that "
        "from_pretrained loads where hf_cod is imported, and with trust_remote_code without it. Interrupted, the same "
        "command goes on where it stopped. The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, files, rest = parser.parse(arguments)
    return write_results("narrow", rest.model, files, partial(run, rest.model, loading, text, settings, files.scores))


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: NarrowSettings,
    scores_file: str | None,
    journal: Path,
    output: Path,
) -> RunReport:
    """Measures, narrows, saves, and measures again what was saved; memory never holds two models."""
    scores = None if scores_file is None else LayerScores.load(scores_file)
    model, tokenizer = load_with_tokenizer(source, loading)
    if scores is not None:
        scores.check(find_decoder_layers(model, settings.layers_path))
    calibration, evaluation = split_text(model, tokenizer, text, settings)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    speeds = speeds_of({"intact": model}, evaluation, settings)
    scores = scores or _scores(model, calibration, settings)
    plan = allocate(scores, "parameters", settings.parameters, settings.spread)
    chosen: dict[str, Any] = {"method": settings.method, "compensation": settings.compensation}
    chosen |= {"channel_multiple": settings.multiple, "layers_path": settings.layers_path}
    chosen |= {"batches": calibration, "journal": journal, "show_progress": True}
    if settings.baseline and scores.method != "uniform":
        narrow(model, settings.parameters, **chosen)
        perplexities["uniform"] = measure_perplexity(model, evaluation, settings)
        del model
        model, _ = load_model(source, loading)
    report = narrow(model, plan, name=model_title(source), **chosen)
    save_results(output, model, tokenizer, scores, {"allocation.json": plan})
    del model
    saved, _ = load_model(str(output), replace(loading, revision="main"))
    perplexities["narrowed"] = measure_perplexity(saved, evaluation, settings)
    speeds |= speeds_of({"narrowed": saved}, evaluation, settings)
    results = measured_results(report, output, perplexities, speeds, evaluation)
    return replace(
        report,
        settings={
            **asdict(settings),
            "score": scores.method,
            "text": text.text,
            "scores": scores_file,
            **describe_batches(calibration),
        },
        layers={**report.layers, "score": scores.values},
        results=results,
        summary=[
            *report.summary,
            describe_sizes(results, "narrowed"),
            *describe_perplexity(results, "narrowed"),
            *describe_speed(results, "narrowed"),
            *scores.remarks,
        ],
    )


def _scores(model: nn.Module, batches: Sequence[Batch], settings: NarrowSettings) -> LayerScores:
    chosen = {name: getattr(settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
    if settings.parameters < 1:  # what sensitivity and auto try is sparsity: the nearest that they know
        chosen["target"] = 1 - settings.parameters
    return score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)
