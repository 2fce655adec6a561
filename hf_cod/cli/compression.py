"""What the commands share that take something of each layer by its score: samples, measuring, output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.cli.output import JOURNAL, check_output, finish, require_plots, results_of
from hf_cod.cli.parser import default_directory
from hf_cod.cli.terminal import print_report
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.settings import ModelSettings, SampleSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches, load_texts, mask_tokens, split_samples
from hf_cod.io.text import token_batches as cut_into_batches
from hf_cod.layers.checks import check_length
from hf_cod.layers.speed import PROMPT_TOKENS, measure_speed
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.settings import ScoreSettings

Speeds = dict[str, dict[str, float | None]]
"""Name of a model -> what `ModelSpeed.medians` tells of it."""


def as_in(settings: type, name: str) -> Any:
    """A field with the default and the help that it has in other settings."""
    (found,) = (f for f in fields(settings) if f.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass
class MeasuringSettings(SampleSettings):
    """On which samples the work is done, and on which what comes of it is measured."""

    eval_text: str | None = field(
        default=None, metadata={"help": "text to measure perplexity on; default: other samples of the same text"}
    )
    eval_samples: int = field(default=32, metadata={"help": "samples to measure perplexity on"})
    layers_path: str | None = as_in(ScoreSettings, "layers_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples: expected at least 1, got {self.eval_samples}")


@dataclass
class SpeedSettings:
    """Whether speed is measured."""

    speed: bool = field(
        default=True,
        metadata={
            "help": "measure how many tokens a second are read and generated, which takes some time of a big model"
        },
    )


@dataclass
class CompressionSettings(MeasuringSettings):
    """How a budget is distributed over layers, and on which samples what comes of it is measured."""

    threshold: float = as_in(ScoreSettings, "threshold")
    per_module: bool = as_in(ScoreSettings, "per_module")
    baseline: bool = field(
        default=True, metadata={"help": "also treat all layers alike, to see what the score is worth; twice the time"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ScoreSettings(threshold=self.threshold)


@dataclass
class SpreadSettings(CompressionSettings):
    """The same, for budgets of which each layer may get more or less."""

    spread: float | None = field(
        default=None, metadata={"help": "lambda: layers get budget - lambda to budget + lambda; default: 0.08"}
    )


@dataclass
class ResultsOutput:
    """Where results go."""

    output: str | None = field(
        default=None,
        metadata={"help": "new directory for model, report and pictures; default: hf-cod-COMMAND-MODEL"},
    )
    plots: bool = field(default=True, metadata={"help": "draw the pictures (needs matplotlib)"})


@dataclass
class CompressionOutput(ResultsOutput):
    """The same, and what is read beside the model."""

    scores: str | None = field(default=None, metadata={"help": "scores.json of hf-cod score, instead of scoring anew"})


def write_results(
    command: str, model: str, files: ResultsOutput, work: Callable[[Path, Path], RunReport | None]
) -> int:
    """Does the work of a command that makes a model, in a directory that is complete afterwards or not there.

    Args:
        command: its name.
        model: the model's name, as the user gave it.
        files: where results go.
        work: (directory for a journal, directory for model and plans) -> the report of it, to which pictures are
            added, or None where nothing was to be made.

    Returns:
        The exit status.
    """
    directory = Path(files.output or default_directory(command, model))
    check_output(directory, model)
    if files.plots:
        require_plots()
    results = results_of(directory)
    report = work(directory / JOURNAL, results)
    if report is None:
        print(f"\nnothing was made; what was measured is kept in {directory.resolve()}")
        return 0
    if files.plots:
        report.plot(results)
    report.save(results)
    finish(directory, results)
    print_report(report)
    print(f"\nwritten to {directory.resolve()}")
    return 0


def measured_results(
    report: RunReport,
    output: Path,
    perplexities: dict[str, float | None],
    speeds: Speeds,
    evaluation: Sequence[Batch],
) -> dict[str, Any]:
    """A report's results with the bytes of what was saved, what perplexity became on which samples, and speed."""
    return {
        **report.results,
        "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "perplexity": perplexities,
        "speed": speeds,
        "evaluation": describe_batches(evaluation),
    }


def load_with_tokenizer(source: str, loading: ModelSettings) -> tuple[nn.Module, Any]:
    """The model and its tokenizer.

    Raises:
        ValueError: it has none, so that there are no samples to cut; or no such model.
    """
    model, tokenizer = load_model(source, loading)
    if tokenizer is None:
        raise ValueError(f"model: expected a model with a tokenizer, got {source!r}; use hf_cod in Python")
    return model, tokenizer


def split_text(
    model: nn.Module, tokenizer: Any, text: TextSettings, settings: MeasuringSettings
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Samples to work on and, apart from them, to measure on: of one text the earlier and the later ones.

    Raises:
        ValueError: a text that is too short for both, or samples that are too long for the model.
    """
    check_length(model, settings.sequence_length)
    calibrating, measuring = settings.max_samples, settings.eval_samples
    first: Sequence[Batch]
    second: Sequence[Batch]
    if settings.eval_text is not None:
        other = load_texts(replace(text, text=settings.eval_text))
        first = cut_into_batches(tokenizer, load_texts(text), settings)
        second = cut_into_batches(tokenizer, other, replace(settings, max_samples=measuring))
    else:
        both = replace(settings, max_samples=calibrating + measuring)
        batches = cut_into_batches(tokenizer, load_texts(text), both)
        drawn = describe_batches(batches)["samples"]
        if drawn < 2:
            raise ValueError(
                f"text: expected at least two samples of {settings.sequence_length} tokens, one to work on and one "
                "to measure on, got one; give a longer text, --eval-text, or a shorter --sequence-length"
            )
        share = calibrating / (calibrating + measuring)
        first, second = split_samples(batches, min(drawn - 1, max(1, round(drawn * share))))
    if task_of(model) == "masked_lm":
        return mask_tokens(tokenizer, first, settings.seed), mask_tokens(tokenizer, second, settings.seed)
    return first, second


def save_results(
    directory: Path, model: Any, tokenizer: Any, scores: LayerScores | None, plans: Mapping[str, Any] | None = None
) -> None:
    """Saves what a command made beside what it followed.

    Args:
        directory: results of `results_of`.
        model, tokenizer: to load again.
        scores: or None.
        plans: name of a file -> a plan that saves itself.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if scores is not None:
        scores.save(directory / "scores.json")
    for name, plan in (plans or {}).items():
        plan.save(directory / name)


def describe_sizes(results: dict[str, Any], after: str) -> str:
    """A sentence on what became of the whole model: results["parameters"] holds "intact" and `after`."""
    before, left = results["parameters"]["intact"], results["parameters"][after]
    return (
        f"The whole model has {left:,} parameters, {format_number(left / before)} of the {before:,} before; "
        f"{results['bytes'] / 1e6:,.1f} MB on disk."
    )


def measure_perplexity(model: nn.Module, batches: Sequence[Batch], settings: MeasuringSettings) -> float | None:
    """Perplexity on the batches; None for a model that is no language model."""
    if task_of(model) not in LANGUAGE_MODELS:
        return None
    return held_out_perplexity(model, batches, settings.layers_path)


def speeds_of(models: Mapping[str, nn.Module], batches: Sequence[Batch], settings: Any) -> Speeds:
    """Name -> `ModelSpeed.medians`, in turns, on the first sample or its beginning; none where `settings.speed` is off.

    A command that holds one model at a time asks for the intact one before it is changed, and for what was saved
    afterwards: what else the machine does in between is in the figures. `heal`, which holds two, has them take turns,
    as examples/benchmarks/smaller.py has.
    """
    if not settings.speed:
        return {}
    path = getattr(settings, "layers_path", None)
    stacks = {name: find_decoder_layers(model, path) for name, model in models.items()}
    prompt = batches[0]["input_ids"][:1, :PROMPT_TOKENS]
    return {name: found.medians() for name, found in measure_speed(stacks, prompt).items()}


def describe_speed(results: dict[str, Any], after: str, before: str = "intact") -> list[str]:
    """A sentence on what became of speed: results["speed"] holds `before` and `after`, or nothing."""
    if not results["speed"]:
        return []
    old, new = results["speed"][before], results["speed"][after]
    told = {"prompt": f"of a prompt of {new['prompt_tokens']}", "generation": "generated one by one"}
    figures = [
        f"{format_number(new[part])} {what} ({before} {format_number(old[part])}: {new[part] / old[part]:.2f} times)"
        for part, what in told.items()
        if old[part] is not None and new[part] is not None
    ]
    apart = "" if before == "teacher" else "; timed apart, so that a busy machine shows, too"
    return [f"Tokens a second: {', '.join(figures)}{apart}."]


def describe_perplexity(results: dict[str, Any], after: str) -> list[str]:
    """Sentences on what perplexity became: results["perplexity"] holds "intact", `after`, and maybe "uniform" (all
    layers alike) and "recovered".
    """
    figures = results["perplexity"]
    found = {name: format_number(value) for name, value in figures.items() if value is not None}
    if not found:
        return []
    compared = f" (all layers alike: {found['uniform']})" if "uniform" in found else ""
    if "recovered" in found:
        compared += f" and by recovery to {found['recovered']}"
    sentences = [
        f"Perplexity goes from {found['intact']} to {found[after]}{compared}, measured on "
        f"{results['evaluation']['samples']} samples that were not seen before."
    ]
    # What looks alike in the sentence above is no harm.
    if "uniform" in found and found["uniform"] != found[after] and figures["uniform"] < figures[after]:
        sentences.append("So on these samples this score does harm: --score uniform treats all layers alike.")
    return sentences
