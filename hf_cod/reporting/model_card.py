"""Release of a pre-trained model as a directory for the Hub: weights, code, and a model card from the run's report."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import CONFIG_MAPPING

from hf_cod.analysis.monitoring.history import TrainingHistory
from hf_cod.io.files import copy_aside, write_text
from hf_cod.io.markdown import escaped
from hf_cod.io.models import load_model
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.reading import read_json, read_text
from hf_cod.io.report import RunReport, format_interval, format_number
from hf_cod.io.requirements import requirement
from hf_cod.io.schema import read_record
from hf_cod.io.settings import resolve
from hf_cod.models.families import FAMILIES, Family
from hf_cod.reporting.card_entries import check_card_entries
from hf_cod.reporting.result_card import TAG
from hf_cod.reporting.settings import CardFields, CardSettings

PAPER = "https://arxiv.org/abs/2502.05795"
PICTURES = {
    "curve": "Loss by training step.",
    "angular_distance": "Angular distance between layer l and layer l + n; yellow: small distance.",
    "layer_drop": "Perplexity without each single layer.",
    "variance": "Variance of each layer's output.",
    "variance_by_step": "Output variance of each layer during training.",
    "effective_depth_by_step": "Effective depth during training, at the last token of a few windows.",
}
LITTLE_TEXT = 1e9  # tokens
LLAMA = "cod_llama"  # model type of the models of examples/pretrain.py


def release(
    run: str | Path, output: str | Path, settings: CardSettings | None = None, **fields: Unpack[CardFields]
) -> Path:
    """Writes a pre-trained model and its card into a directory that can be uploaded to the Hub.

    The weights are rounded to bfloat16. The card is README.md; its plots are saved next to it.

    Args:
        run: output directory of examples/pretrain.py: the model, report.json, layer_diagnostics/.
        output: directory to write.
        settings: entries of the card that the report does not contain.
        **fields: fields of `CardSettings` as keywords (name, license, sources, language, where, comparison); they
            override `settings`.

    Returns:
        The path of the card.

    Raises:
        ValueError: `run` is not the directory of a finished run, a file named in the settings does not exist, or the
            output directory has a README.md that is not a card of hf_cod.
        ImportError: matplotlib is not installed.
    """
    run, output = Path(run), Path(output)
    settings = resolve(release, CardSettings, settings, fields)
    settings = replace(settings, name=settings.name or output.resolve().name)
    report = RunReport.load(run)
    if report.kind != "pretrain":
        raise ValueError(f"run: expected a run of pre-training, got one of {report.kind} in {str(run)!r}")
    check_card_entries(report)
    readme = output / "README.md"
    if readme.is_file() and TAG not in read_text(readme, "output", errors="replace"):
        raise ValueError(
            f"output: expected no README.md of other origin, got one in {str(output)!r}; use another directory"
        )
    # Before 0.2 the model was saved in a subdirectory.
    trained = run if (run / "config.json").is_file() else run / "model"
    with OutputDirectory(output, source=str(trained)) as directory:
        model, tokenizer = load_model(str(trained), dtype="bfloat16", device="cpu")
        if tokenizer is None:
            raise ValueError(f"run: expected a model with a tokenizer, got none in {str(trained)!r}")
        model.save_pretrained(directory.results)  # type: ignore[operator]
        tokenizer.save_pretrained(directory.results)
        kind = cast(Any, model.config).model_type
        pictures = _draw(report, run, directory.results)
        write_text(directory.results / readme.name, str(model_card(report, settings, pictures, kind)))
        directory.finish()
    return readme


def model_card(report: RunReport, settings: CardSettings, pictures: list[str], model_type: str = LLAMA) -> ModelCard:
    """The model card of a pre-trained model.

    Args:
        report: the report of the run.
        settings: entries of the card that the report does not contain.
        pictures: names (keys of `PICTURES`) of the plots that are saved next to the card.
        model_type: the `model_type` of the model's config, one of this package or of transformers.

    Raises:
        ValueError: a model of another type, or a file named in the settings does not exist or has another format.
    """
    check_card_entries(report)
    name = settings.name or report.model.replace(" ", "-")
    family, title = _family(model_type)
    perplexity = report.results["validation_perplexity"]
    data = ModelCardData(
        language=settings.language,
        license=settings.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_cod", TAG, f"norm-placement-{report.settings['norm_placement']}"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=_validated_on(report.settings),
                metric_type="perplexity",
                metric_value=round(perplexity, 3),
            )
        ],
    )
    sections = [
        _what(report, name, title),
        _use(report, name, settings.where, family),
        _results(report, pictures),
        _training(report),
    ]
    sections += [_texts(settings.sources)] if settings.sources else []
    sections += [_comparison(settings.comparison)] if settings.comparison else []
    if family is not None:
        sections.append(f"## Source\n\n[The Curse of Depth in Large Language Models]({PAPER}), Sun et al. 2025.")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _draw(report: RunReport, run: Path, output: Path) -> list[str]:
    """Saves the plots of the trained model and of its training; returns the names of those that the card shows."""
    history = run / "layer_diagnostics"
    with tempfile.TemporaryDirectory() as folder:
        report.plot(folder)
        if history.is_dir():
            TrainingHistory.load(history).report().plot(folder)
        drawn = [name for name in PICTURES if (Path(folder) / f"{name}.png").is_file()]
        for name in drawn:
            copy_aside(Path(folder) / f"{name}.png", output / f"{name}.png")
    return drawn


def _validated_on(told: dict[str, Any]) -> str:
    """Description of the validation text."""
    text = Path(told["text"]).name if told.get("text") else "an embedded novel"
    if told.get("validation_text"):
        return Path(told["validation_text"]).name
    return f"{text}, {told['validation_split']}" if told.get("validation_split") else f"held-out parts of {text}"


def _family(model_type: str) -> tuple[Family | None, str]:
    """The family, which a stock model does not have, and the name in transformers."""
    families = {family.model_type: family for family in FAMILIES}
    if model_type in families:
        return families[model_type], families[model_type].title
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"run: expected a model of type {', '.join(families)} or of transformers, got {model_type!r}")
    return None, CONFIG_MAPPING[model_type].__name__.removesuffix("Config")


def _what(report: RunReport, name: str, title: str) -> str:
    counted = report.results["parameters"]
    millions = (counted if isinstance(counted, int) else counted["trained"]) / 1e6  # a number in reports of 0.1
    tokens: int = report.results["tokens"]
    small = " It is small and trained on little text: use it for measurements, not for text generation."
    return (
        f"# {escaped(name)}\n\nA {title} of {report.n_layers} layers and {millions:.1f} million parameters with "
        f"norm placement `{report.settings['norm_placement']}`, trained from scratch on "
        f"{tokens / 1e6:.3g} million tokens." + small * (tokens < LITTLE_TEXT)
    )


def _use(report: RunReport, name: str, where: str | None, family: Family | None) -> str:
    required = f"`{shlex.join(['pip', 'install', 'torch', requirement('transformers')])}`"
    code = "" if family is None else ", trust_remote_code=True"
    told = (
        f"transformers loads the model without hf_cod ({required}):\n"
        if family is None
        else f"The directory contains the model's code, so hf_cod is not required, only {required}:\n"
    )
    lines = [
        "## Load it\n",
        *([where, ""] if where else []),
        told,
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{code})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{code})\n```\n",
    ]
    measures = f"`hf-cod diagnose {shlex.quote(name)}` measures its layers."
    if family is None:
        return "\n".join([*lines, measures])
    lines.append(f"If hf_cod is installed and imported, the model loads without `trust_remote_code`; {measures}")
    stock = family.title
    if report.settings["norm_placement"] in family.foldable:
        lines.append(
            f"\nConversion to a stock {stock} with equal logits, for vLLM, llama.cpp and other software for {stock}:"
            f"\n\n```sh\nhf-cod convert stock {shlex.quote(name)} as-{stock.lower()}\n```"
        )
    else:
        lines.append(f"\nThis placement cannot be converted to a stock {stock}, which computes the norms elsewhere.")
    return "\n".join(lines)


def _results(report: RunReport, pictures: list[str]) -> str:
    found = report.results
    rows = [("validation perplexity (float32)", format_number(found["validation_perplexity"]))]
    if report.layers:
        depth = found.get("effective_depth")
        rows.append(("output variance of the first and last layer", _ends(report.layers["variance"])))
        if depth is not None:  # None if no layer changes the direction of the hidden state
            rows += [
                ("effective depth, 95 % interval", f"{format_interval(depth)} of {report.n_layers} layers"),
                ("late half's share of all angular distance", format_number(found["late_share"])),
            ]
    lines = ["## Results\n", "| figure | value |\n|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += [
        "",
        f"Measured on {found['validation_tokens']:,} held-out tokens (measures by layer: on the first of them).",
        "",
    ]
    lines += [f"- {escaped(sentence)}" for sentence in [*report.summary, *report.notes]]
    lines += [f"\n![{PICTURES[name]}]({name}.png)" for name in pictures]
    return "\n".join(lines)


def _ends(values: list[Any]) -> str:
    return f"{format_number(values[0])}, {format_number(values[-1])}"


def _training(report: RunReport) -> str:
    told = report.settings
    text = Path(told["text"]).name if told.get("text") else "an embedded novel"
    return (
        f"## Training\n\nText: {escaped(text)}. "
        f"{told['steps']} steps of {told['batch_size']} sequences of {told['sequence_length']} tokens; Adam without "
        f"weight decay or clipping, learning rate {told['learning_rate']:g} after a warm-up over a tenth of the steps, "
        f"cosine decay to a tenth of it; {escaped(told['precision'])}; seed {told['seed']}. The weights were rounded "
        "to bfloat16 after all measurements.\n\n"
        + f"Made with {', '.join(escaped(f'{key} {value}') for key, value in report.environment.items())}."
    )


@dataclass(frozen=True)
class _Source:
    package: str
    characters: int
    license: str
    evidence: str
    pieces: int | None = None  # written by pretraining_text.py, not shown


@dataclass(frozen=True)
class _Sources:
    sources: dict[str, _Source]


def _texts(path: str) -> str:
    try:
        sources = read_record(_Sources, read_json(path, "sources"), "sources", extra=True).sources
    except ValueError as error:
        raise ValueError(f"sources: expected a sources.json of pretraining_text.py, got {path!r}: {error}") from error
    lines = [
        "## Texts and their licences\n",
        "| text | package | characters | licence | evidence |\n|---|---|---:|---|---|",
    ]
    for name, source in sources.items():
        facts = [source.package, f"{source.characters:,}", source.license, source.evidence]
        lines.append("| " + " | ".join(map(escaped, (name, *facts))) + " |")
    return "\n".join(lines)


def _comparison(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"comparison: expected a comparison.md of compare_placements.py, got {path!r}")
    return (
        "## Comparison with other placements\n\nShorter runs of the same model, each placement at the best learning "
        "rate of one grid; mean ± standard deviation over seeds.\n\n" + read_text(path, "comparison").strip()
    )
