"""hf-cod quantize MODEL: three and four bits a weight, four in the layers that matter more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from hf_cod.analysis.statistics.layer_statistics import collect_statistics
from hf_cod.cli.compression import (
    CompressionOutput,
    CompressionSettings,
    as_in,
    describe_perplexity,
    load_with_tokenizer,
    measure_perplexity,
    split_text,
    write_results,
)
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.compression.quantization.config import OwlBnbConfig
from hf_cod.compression.quantization.plan import plan_bits
from hf_cod.compression.quantization.quantize import quantize
from hf_cod.compression.quantization.settings import StorageSettings, check_bits
from hf_cod.functional.bits import BITS
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.size import bytes_of
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import ScoreSettings

ROUNDINGS = ("compensated", "weighted", "nearest")


@dataclass
class QuantizeSettings(CompressionSettings, StorageSettings):
    """What is quantized, and on which samples."""

    bits: float = as_in(OwlBnbConfig, "bits")
    score: str = as_in(ScoreSettings, "method")
    rounding: str = field(
        default="compensated",
        metadata={
            "help": "compensated: errors are made up for by what is still to be rounded (GPTQ); weighted: scales by "
            "what errors do to outputs; nearest: without a look at the text, and far worse at 3 bits",
            "choices": list(ROUNDINGS),
        },
    )
    skip: list[str] = field(
        default_factory=list, metadata={"help": "parts of names of matrices to leave as they are, such as down_proj"}
    )
    baseline: bool = field(
        default=True,
        metadata={"help": "also quantize all layers to 3 and to 4 bits, to see where the mixture lies; 3 x the time"},
    )
    explain: bool = field(default=False, metadata={"help": "print who gets how many bits, and why"})

    def __post_init__(self) -> None:
        CompressionSettings.__post_init__(self)
        StorageSettings.__post_init__(self)
        check_bits(self.bits)
        for name, valid in (("score", SCORES), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}")

    @property
    def mixed(self) -> bool:
        """Whether some matrices get three bits and some four."""
        return self.bits not in BITS


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, QuantizeSettings, CompressionOutput],
        prog="hf-cod quantize",
        description="Stores the layers' matrices in three and four bits a weight, four in layers that matter more, and "
        "writes a model that from_pretrained loads wherever hf_cod is imported. Interrupted, the same command goes on "
        "where it stopped. The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    loading, text, settings, files, rest = parser.parse(arguments)
    import hf_cod.compression.quantization.bnb  # noqa: F401 - its absence is told before any work

    return write_results("quantize", rest.model, files, partial(run, rest.model, loading, text, settings, files.scores))


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: QuantizeSettings,
    scores_file: str | None,
    journal: Path,
    output: Path,
) -> RunReport:
    """Measures, quantizes, saves, and measures again what was saved; memory never holds two models."""
    model, tokenizer = load_with_tokenizer(source, loading)
    calibration, evaluation = split_text(model, tokenizer, text, settings)
    perplexities = {"intact": measure_perplexity(model, evaluation, settings)}
    before = bytes_of(model)
    scores = _scores(model, calibration, settings, scores_file)
    if settings.explain:
        _explain(model, settings, scores)
    work = _Work(calibration, journal, settings, model_title(source))
    for title, bits in (("three", 3.0), ("four", 4.0)) if settings.baseline and settings.mixed else ():
        work.quantize(model, replace(settings, bits=bits), scores)
        perplexities[title] = measure_perplexity(model, evaluation, settings)
        del model
        model, _ = load_model(source, loading)
    report = work.quantize(model, settings, scores)
    model.save_pretrained(output)  # type: ignore[operator]
    tokenizer.save_pretrained(output)
    if scores is not None:
        scores.save(output / "scores.json")
    del model
    saved, _ = load_model(str(output), replace(loading, revision="main"))
    perplexities["quantized"] = measure_perplexity(saved, evaluation, settings)
    results = {
        **report.results,
        "disk_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "memory_bytes": {"intact": before, "quantized": bytes_of(saved)},
        "perplexity": perplexities,
        "evaluation": describe_batches(evaluation),
    }
    if scores is not None:
        results["score"] = scores.settings
    told = {**asdict(settings), "text": text.text, "scores": scores_file, **describe_batches(calibration)}
    remarks = [] if scores is None else scores.remarks
    summary = [*report.summary, _sizes(results), *describe_perplexity(results, "quantized"), *_ends(results), *remarks]
    summary.append("To load it, import hf_cod before from_pretrained.")
    return replace(report, settings=told, results=results, summary=summary)


@dataclass(frozen=True)
class _Work:
    """What quantizing a model takes, however many bits it is to get."""

    batches: Sequence[Batch]
    journal: Path
    settings: QuantizeSettings
    title: str

    def quantize(self, model: Any, settings: QuantizeSettings, scores: LayerScores | None) -> RunReport:
        """Quantizes in place, by the way of rounding that was asked for."""
        path = settings.layers_path
        options: dict[str, Any] = {
            "journal": self.journal,
            "layers_path": path,
            "name": self.title,
            "show_progress": True,
        }
        storage = {f.name: getattr(settings, f.name) for f in fields(StorageSettings)}
        config = OwlBnbConfig(bits=settings.bits, scores=scores, skip=settings.skip, **storage)
        if settings.rounding == "weighted":
            config.statistics = collect_statistics(model, self.batches, layers_path=path, show_progress=True)
        elif settings.rounding == "compensated":
            options["batches"] = self.batches
        return quantize(model, config, **options)


def _scores(
    model: nn.Module, batches: Sequence[Batch], settings: QuantizeSettings, scores_file: str | None
) -> LayerScores | None:
    """None where all layers get the same width."""
    if scores_file is not None:
        return LayerScores.load(scores_file)
    if not settings.mixed:
        return None
    chosen = {name: getattr(settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
    if settings.score in ("sensitivity", "auto"):
        chosen |= {"pruner": "codebook", "target": settings.bits}
    return score_layers(model, method=settings.score, batches=batches, show_progress=True, **chosen)


def _explain(model: nn.Module, settings: QuantizeSettings, scores: LayerScores | None) -> None:
    stack = find_decoder_layers(model, settings.layers_path)
    plan = plan_bits(stack, settings.bits, settings, scores, settings.skip)
    values = [0.0] * len(stack) if scores is None else scores.values
    order = sorted(range(len(stack)), key=lambda i: -values[i])
    title = f"{plan.stored:.3f} stored bits a weight"
    table = Table(*("layer", "score", "rank", "matrices of four bits", "of three"), title=title)
    for index in range(len(stack)):
        names = [name for name in stack.linears(index) if name in plan.bits]
        four = [name.rsplit(".", 1)[-1] for name in names if plan.bits[name] == 4]
        told = "all" if len(four) == len(names) else ", ".join(four) or "none"
        row = (index, format_number(values[index]), order.index(index) + 1, told, len(names) - len(four))
        table.add_row(*map(str, row))
    console = Console()
    console.print(table)
    if not settings.mixed:
        return
    why = "by equal scores, earlier layers first" if scores is None else f"by {scores.method}, highest scores first"
    console.print(
        f"Four bits {why}, until {settings.bits:g} stored bits a weight are spent; the layer where they end gets them "
        "in the matrices that still fit, in the order of the model.",
        highlight=False,
    )


def _sizes(results: dict[str, Any]) -> str:
    memory = results["memory_bytes"]
    return (
        f"The whole model takes {memory['quantized'] / 1e6:,.1f} MB in memory, {memory['intact'] / 1e6:,.1f} before; "
        f"{results['disk_bytes'] / 1e6:,.1f} MB on disk."
    )


def _ends(results: dict[str, Any]) -> list[str]:
    """What all layers in three bits and all in four would give."""
    found = results["perplexity"]
    if found.get("three") is None:
        return []
    return [f"All layers in 3 bits: {format_number(found['three'])}; in 4 bits: {format_number(found['four'])}."]
