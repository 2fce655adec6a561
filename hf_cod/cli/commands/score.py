"""hf-cod score MODEL: score the importance of each layer, and of each expert of a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.output import require_plots, save_report, say_written
from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.cli.settings import LimitedModelSettings, PlotSettings
from hf_cod.io.settings import (
    DefaultName,
    DefaultNumber,
    SampleSettings,
    TextSettings,
    as_in,
    check_choice,
    check_effect,
)
from hf_cod.scoring.settings import EXPERT_METHODS, METHODS, OPTIONS, ScoreSettings

if TYPE_CHECKING:
    from torch import nn

    from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
    from hf_cod.io.journal import Journal
    from hf_cod.io.report import RunReport
    from hf_cod.io.text import Batch
    from hf_cod.scoring.layer_scores import LayerScores

STATISTICS, SCORES, EXPERT_SCORES = "statistics.safetensors", "scores.json", "expert_scores.json"
IMATRIX = "imatrix.gguf"


@dataclass
class ScoreOptions(SampleSettings, ScoreSettings):
    """Settings of samples and of the score, with one common seed."""

    threshold: float = as_in(ScoreSettings, "threshold", default=DefaultNumber(ScoreSettings().threshold))
    target: float = as_in(ScoreSettings, "target", default=DefaultNumber(ScoreSettings().target))
    pruner: str = as_in(ScoreSettings, "pruner", default=DefaultName(ScoreSettings().pruner))
    experts: str | None = field(
        default=None,
        metadata={
            "help": "also score each expert of a mixture of experts, and write expert_scores.json and a heat map; the "
            "property that gives an expert a high score. "
            + "; ".join(f"{name}: {row.description}" for name, row in EXPERT_METHODS.items())
            + " (default: experts are not scored)",
            "choices": list(EXPERT_METHODS),
        },
    )

    def __post_init__(self) -> None:
        SampleSettings.__post_init__(self)
        ScoreSettings.__post_init__(self)
        of_experts: tuple[str, ...] = ()
        if self.experts is not None:
            check_choice("experts", self.experts, EXPERT_METHODS)
            of_experts = EXPERT_METHODS[self.experts].settings
        unused = [name for name in OPTIONS if name not in (*METHODS[self.method].settings, *of_experts)]
        check_effect(self, unused, f"method {self.method}, which does not use it")

    @property
    def uses_statistics(self) -> bool:
        """Whether the method uses statistics; sensitivity and kl need none if they prune by magnitude."""
        by_magnitude = self.method in ("sensitivity", "kl") and self.pruner == "magnitude"
        return METHODS[self.method].uses_statistics and not by_magnitude


@dataclass
class ScoreOutput(PlotSettings):
    """Settings of a statistics file and of the output directory."""

    statistics: str | None = field(
        default=None,
        metadata={
            "help": "statistics.safetensors of an earlier run, or an importance matrix of llama.cpp (imatrix.gguf), to "
            "be used instead of collecting statistics; default: those in the output directory if they are of the same "
            "model and samples, else they are collected"
        },
    )
    imatrix: bool = field(
        default=False,
        metadata={"help": "also write the statistics as imatrix.gguf, for llama-quantize (requires the gguf package)"},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "directory for statistics, scores, report and plot; default: hf-cod-score-MODEL"},
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [LimitedModelSettings, TextSettings, ScoreOptions, ScoreOutput],
        prog="hf-cod score",
        description="Scores the importance of each layer, by OWL's share of outliers or another method, and writes "
        "statistics.safetensors and scores.json for other commands; with --experts also scores each expert of a "
        "mixture. Statistics in the output directory are reused if model and samples are the same, also with another "
        "method.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, output, rest = make_parser().parse(arguments)
    if output.statistics is not None and not settings.uses_statistics:
        got = f"got {output.statistics!r}"
        raise ValueError(f"statistics: expected none with method {settings.method}, which does not use them, {got}")
    from hf_cod.analysis.statistics.layer_statistics import check_file
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.cli.terminal import print_report
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.rows import text_notes
    from hf_cod.io.text import load_texts, token_batches
    from hf_cod.layers.batches import with_labels
    from hf_cod.layers.checks import check_length
    from hf_cod.layers.memory_limit import SCORED, MemoryLimit, above_limit
    from hf_cod.layers.stack import find_decoder_layers, unwrap

    kept, loading = MemoryLimit(loading.limit()), loading.without_limit()
    directory = Path(output.output or default_directory("score", rest.model))
    texts = load_texts(text)
    if output.plots:
        require_plots()
    if output.statistics is not None:
        check_file(output.statistics)
    with OutputDirectory(directory, source=rest.model, check=_check_reused) as place:
        model, tokenizer = load_with_tokenizer(rest.model, loading, "hf_cod.score_layers", True, kept.given)
        check_length(model, settings.sequence_length)
        batches = with_labels(model, tokenizer, token_batches(tokenizer, texts, settings), settings.seed)
        kept.check(find_decoder_layers(unwrap(model), settings.layers_path), batches, SCORED)
        told, name = asdict(loading) | asdict(text), model_title(rest.model)
        report = run(model, batches, settings, output, directory, name, told)
        report = replace(report, notes=[*text_notes(text), *report.notes], results=report.results | kept.results())
        report = replace(report, notes=[*report.notes, *above_limit(report.results)])
        save_report(report, place.results, output)
        written = [STATISTICS, SCORES, *([EXPERT_SCORES] if settings.experts else [])]
        place.finish(beside=[*written, *([IMATRIX] if output.imatrix else [])])
    print_report(report)
    say_written(directory)
    return 0


def run(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: ScoreOptions,
    output: ScoreOutput,
    directory: Path,
    name: str,
    told: dict[str, Any],
) -> RunReport:
    """Collects statistics (or reads existing ones), scores layers and experts, writes all; returns the report.

    Its results have, as "score_settings", the settings of the method and its choices; `told` are those of its inputs.
    """
    from hf_cod.analysis.statistics.layer_statistics import LayerStatistics, collect_statistics
    from hf_cod.io.report import RunReport
    from hf_cod.io.text import describe_batches
    from hf_cod.layers.devices import environment_of
    from hf_cod.layers.fingerprints import Journals
    from hf_cod.layers.gguf_names import gguf_names
    from hf_cod.layers.stack import find_decoder_layers, unwrap
    from hf_cod.scoring.expert_methods import check_mixture

    base: Any = unwrap(model)
    earlier, path = output.statistics, settings.layers_path
    if settings.experts is not None:
        check_mixture(find_decoder_layers(base, path))
    if output.imatrix:
        gguf_names(find_decoder_layers(base, path))
    journals = Journals(directory, model, batches)
    inputs = {"statistics": earlier, "inputs": journals.inputs, **describe_batches(batches)}
    report = RunReport(
        kind="score",
        model=name,
        settings={**asdict(settings), **inputs, **told},
        environment=environment_of(base),
        layers={},
        results={},
    )
    file, journal = directory / STATISTICS, journals.of("statistics", path)
    kept = None if earlier else _kept(file, journal)
    statistics = LayerStatistics.load(earlier, model=base, layers_path=path) if earlier else kept
    report.keep_earlier(directory, (*(() if kept else (STATISTICS,)), SCORES, EXPERT_SCORES, IMATRIX))
    if statistics is None:
        statistics = collect_statistics(model, batches, layers_path=path, name=name, show_progress=True)
    if output.imatrix:
        statistics.save(directory / IMATRIX, model=base)
    if kept is None:
        statistics.save(file)
        if not earlier:
            journal.add("statistics", _digest(file))
    measured = partial(_measured, model, statistics, batches)
    report = _with_scores(report, measured, settings, directory, _notes(statistics))
    return report if settings.experts is None else _with_experts(report, measured, settings, directory)


def _measured(
    model: nn.Module, statistics: LayerStatistics, batches: Sequence[Batch], score: Callable[..., Any], settings: Any
) -> Any:
    """What `score_layers` or `score_experts` returns."""
    return score(model, statistics, batches=batches, show_progress=True, settings=settings)


def _with_scores(
    report: RunReport, measured: Callable[..., Any], settings: ScoreOptions, directory: Path, notes: list[str]
) -> RunReport:
    """Scores the layers, and writes their scores."""
    from hf_cod.scoring.methods import score_layers

    chosen = ScoreSettings(**{f.name: getattr(settings, f.name) for f in fields(ScoreSettings)})
    scores = measured(partial(score_layers, journal=directory), chosen)
    scores.save(directory / SCORES)
    layers: dict[str, list[Any]] = {"score": scores.values, "parameters": scores.parameters}
    report = replace(report, layers=layers, results={"score_settings": scores.settings}, notes=notes)
    return replace(report, summary=_summary(scores))


def _with_experts(
    report: RunReport, measured: Callable[..., Any], settings: ScoreOptions, directory: Path
) -> RunReport:
    """Scores the experts, and writes their scores; results have them as "expert_scores"."""
    from hf_cod.scoring.expert_methods import score_experts
    from hf_cod.scoring.settings import ExpertScoreSettings

    chosen = ExpertScoreSettings(str(settings.experts), settings.threshold, settings.layers_path)
    scores = measured(score_experts, chosen)
    scores.save(directory / EXPERT_SCORES)
    found = {"method": scores.method, "values": scores.values, "layers": scores.layers, "tokens": scores.tokens}
    unseen = sum(map(len, scores.unseen.values()))
    number = sum(map(len, scores.values.values()))
    told = [f"{number} experts are scored by {scores.method.replace('_', ' ')}; {unseen} of them received no token."]
    return replace(report, results={**report.results, "expert_scores": found}, summary=[*report.summary, *told])


def _check_reused(directory: Path) -> None:
    """Checks that files with the names of our results are ours."""
    from hf_cod.analysis.statistics.imatrix import read_imatrix
    from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
    from hf_cod.io.journal import check_journal
    from hf_cod.io.output_checks import REPORT, check_reused
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.expert_scores import ExpertScores
    from hf_cod.scoring.layer_scores import LayerScores

    ours: dict[str, Callable[[Path], object]] = {
        SCORES: LayerScores.load,
        EXPERT_SCORES: ExpertScores.load,
        IMATRIX: read_imatrix,
        REPORT: RunReport.load,
        "journal.jsonl": check_journal,
    }
    if not (directory / "journal.jsonl").is_file():  # it has the digest of our statistics: damaged ones are replaced
        ours[STATISTICS] = LayerStatistics.load
    check_reused(directory, ours, ("score",))


def _kept(file: Path, journal: Journal) -> LayerStatistics | None:
    """The statistics of an earlier run on the same model and samples, if the file is unchanged."""
    from hf_cod.analysis.statistics.layer_statistics import LayerStatistics

    if "statistics" in journal and file.is_file() and journal["statistics"] == _digest(file):
        return LayerStatistics.load(file)
    return None


def _digest(file: Path) -> str:
    from hf_cod.io.reading import read_bytes

    return hashlib.sha256(read_bytes(file, "statistics")).hexdigest()


def _summary(scores: LayerScores) -> list[str]:
    """The most and least important layers that stand out, and the remarks of the score."""
    from hf_cod.io.report import format_number, standing_out

    few = min(3, len(scores.values) // 2)
    found = []
    for least, word in ((False, "most"), (True, "least")):
        layers = standing_out(scores.values, few, least)
        figures = ", ".join(f"{i} ({format_number(scores.values[i])})" for i in layers)
        if layers:
            found.append(f"layers {figures} matter {word}" if len(layers) > 1 else f"layer {figures} matters {word}")
    said = ", ".join(found) or "no layer stands out"
    return [f"By {scores.method.replace('_', ' ')}, {said}.", *scores.remarks]


def _notes(statistics: LayerStatistics) -> list[str]:
    return [
        f"no token entered {name}" + (f", experts {', '.join(map(str, experts))}" if experts else "")
        for name, experts in statistics.unseen.items()
    ]
