"""hf-cod export MODEL: bits by layer for another engine, and the files that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.output import say_written, write_model
from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.cli.settings import CompressionOutput
from hf_cod.compression.export.settings import ExportSettings
from hf_cod.io.settings import (
    DefaultName,
    ModelSettings,
    SampleSettings,
    TextSettings,
    as_in,
    check_choice,
    check_effect,
)
from hf_cod.scoring.settings import CODEBOOK, COMPUTED, ScoreSettings
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from torch import nn

    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.io.text import Batch
    from hf_cod.scoring.layer_scores import LayerScores

GIVEN = "a plan, which has the bits of each layer"
DEFAULT_SCORE = "owl"  # as of quantize with error compensation


@dataclass
class ExportOptions(SampleSettings, ExportSettings):
    """Settings of the export, of samples, and of the score."""

    max_samples: int = field(
        default=32,
        metadata={"help": "maximum number of calibration samples, chosen at random by seed if the text has more"},
    )
    score: str = field(
        default=DefaultName(DEFAULT_SCORE),
        metadata={
            "help": f"score of layers; those with the highest scores get the larger width: {', '.join(SCORES)}; "
            f"default: {DEFAULT_SCORE}"
        },
    )
    layers_path: str | None = as_in(ScoreSettings, "layers_path")

    def __post_init__(self) -> None:
        SampleSettings.__post_init__(self)
        ExportSettings.__post_init__(self)
        check_choice("score", self.score, SCORES)


@dataclass
class ExportOutput:
    """Settings of files that are read, and of the output directory."""

    scores: str | None = as_in(CompressionOutput, "scores")
    plan: str | None = field(
        default=None,
        metadata={"help": "allocation.json with the bits of each layer; default: by --bits and the score"},
    )
    output: str | None = field(
        default=None, metadata={"help": "new directory for the files and a report; default: hf-cod-export-MODEL"}
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, ExportOptions, ExportOutput],
        prog="hf-cod export",
        description="Distributes bits over the layers of a model for another engine, and writes the files that it "
        "reads: a checkpoint for vLLM, or the configuration and the command line of the engine's own quantization. The "
        "input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    if files.plan is not None:
        if files.scores is not None:
            raise ValueError(f"scores: expected none with {GIVEN}, got {files.scores!r}")
        check_effect(settings, ["bits", "score", "search"], GIVEN)
    if files.scores is not None:
        check_effect(settings, ["score"], COMPUTED)
    elif settings.search:
        check_effect(settings, ["score"], "--search, which starts from several scores")
    from hf_cod.io.inputs import check_file
    from hf_cod.io.output_checks import check_unused
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.text import load_texts

    read = _read(files)
    if settings.gguf is not None:
        check_file(settings.gguf, "gguf", "a GGUF file")
    load_texts(text)
    directory = Path(files.output or default_directory("export", rest.model))
    told = ["export", rest.model, asdict(loading), asdict(text), asdict(settings), files.scores, files.plan]
    output = OutputDirectory(directory, told, check=check_unused, source=rest.model)
    work = partial(run, rest.model, loading, text, settings, files, read)
    write_model(output, work, spent=OutputDirectory.journaled)
    say_written(directory)
    return 0


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: ExportOptions,
    files: ExportOutput,
    read: dict[str, Any],
    output: OutputDirectory,
) -> RunReport:
    """Exports a model to the results of `output`; `read` holds the scores or the plan from a file."""
    from hf_cod.cli.recorded import with_inputs
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.compression.export.exporter import export
    from hf_cod.compression.export.targets import TARGETS
    from hf_cod.io.quantized import check_unquantized
    from hf_cod.io.text import load_texts, token_batches
    from hf_cod.io.whole_checkpoint import WholeCheckpoint
    from hf_cod.layers.batches import with_labels
    from hf_cod.layers.checks import check_length
    from hf_cod.models.stored_config import check_storable
    from hf_cod.scoring.imports.importer import import_scores

    loaded, tokenizer = load_with_tokenizer(source, loading)
    model: Any = loaded
    check_unquantized(model, source)
    check_storable(model)
    check_length(model, settings.sequence_length)
    whole = WholeCheckpoint(source, loading, model, tokenizer)
    batches = with_labels(model, tokenizer, token_batches(tokenizer, load_texts(text), settings), settings.seed)
    chosen = ExportSettings(**{f.name: getattr(settings, f.name) for f in fields(ExportSettings)})
    if not read and not settings.search:
        read = {"scores": _score(model, batches, settings)}
    elif files.scores is not None and read["scores"] is None:
        read = {"scores": import_scores(model, files.scores, layers_path=settings.layers_path)}
    rounds = TARGETS[settings.to].rounds
    notes = whole.before_saving(model) if rounds else []
    more: dict[str, Any] = {"journal": output.journal, "layers_path": settings.layers_path, "show_progress": True}
    report = export(model, output.results, chosen, batches=batches, name=model_title(source), **read, **more)
    if rounds:
        whole.after_saving(model, output.results)
    scores = read.get("scores")
    if scores is not None:
        scores.save(output.results / "scores.json")
    score = ("search" if settings.search else settings.score) if scores is None else scores.method
    own = {**asdict(settings), "score": None if files.plan else score, "model": source}
    own |= {"scores": files.scores, "plan": files.plan}
    report = replace(report, settings={**own, **report.settings}, notes=[*report.notes, *notes])
    return with_inputs(report, loading, text)


def _read(files: ExportOutput) -> dict[str, Any]:
    """The scores or the plan from a file, as arguments of `export`."""
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.imports.importer import read_scores

    if files.plan is not None:
        try:
            return {"plan": LayerAllocation.load(files.plan)}
        except ValueError as error:
            raise ValueError(f"plan{str(error).removeprefix(LayerAllocation.FIELD)}") from error  # the option's name
    return {} if files.scores is None else {"scores": read_scores(files.scores)}


def _score(model: nn.Module, batches: Sequence[Batch], settings: ExportOptions) -> LayerScores:
    from hf_cod.scoring.methods import score_layers

    name = str(settings.score)
    tried = {"pruner": CODEBOOK, "target": 3.5} if "pruner" in SCORES[name].settings else {}
    more: dict[str, Any] = {"layers_path": settings.layers_path, "show_progress": True, **tried}
    return score_layers(model, method=name, batches=batches, **more)
