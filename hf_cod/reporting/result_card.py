"""The model card (README.md) of a command's result, from the run's report and the files next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_cod.io.adapters import PLACES, places
from hf_cod.io.files import write_text
from hf_cod.io.markdown import escaped
from hf_cod.io.reading import read_text
from hf_cod.io.report import RunReport, format_number
from hf_cod.reporting.inherited import CARD, Inherited, inherited
from hf_cod.reporting.loading import Loading, hub_id, loading_of, public_name
from hf_cod.reporting.settings import CardSettings

TAG = "curse-of-depth"
# Settings that name the input model of a run.
SOURCES = ("model", "student", "source")
WHAT = {
    "prune": "pruned (weights set to zero)",
    "factorize": "with low-rank factors instead of full matrices",
    "narrow": "with fewer attention heads and MLP channels",
    "drop-layers": "with fewer layers",
    "repeat-layers": "with repeated layers",
    "drop-experts": "with fewer experts",
    "pack": "stored in a sparse format",
    "quantize": "quantized to three and four bits per weight",
    "fit": "compressed to a budget",
    "export": "quantized for another engine",
    "heal": "trained by distillation after compression",
    "finetune": "fine-tuned on text",
    "convert": "converted",
}
TEMPLATE = "[More Information Needed]"  # in PEFT's card template
# base_model_relation of the Hub for models whose weights are replaced.
QUANTIZED = "quantized"


def write_cards(
    directory: str | Path,
    report: RunReport,
    name: str | None = None,
    command: str | None = None,
    settings: CardSettings | None = None,
    meanings: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes a model card for each model and adapter in a run's directory; existing cards are overwritten.

    Args:
        directory: the directory of the run; models and adapters are looked for in it and in its `model` and `adapter`.
        report: the report of the run.
        name: the final name of the directory; default: its current name.
        command: the shell command that reproduces the result.
        settings: a name for the Hub, licence and language.
        meanings: setting -> what it means, for those that the card lists; default: it lists all, without a meaning.

    Returns:
        The paths of the cards.
    """
    directory, settings = Path(directory), settings or CardSettings()
    name = name or directory.resolve().name
    written: list[Path] = []
    for place in places(directory):
        inside = place.relative_to(directory).as_posix()
        called = name if inside == "." else f"{name}/{inside}"
        if settings.name:
            called = f"{settings.name}-{inside}" if written else settings.name
        card = result_card(place, report, called, command, settings, meanings)
        written.append(write_text(place / CARD, str(card)))
    return written


def report_of(directory: str | Path) -> tuple[RunReport, str]:
    """The report of the run that wrote a directory, and the name of the directory for the card.

    Raises:
        ValueError: there is no report in the directory or, for `model` and `adapter` of a run, in its parent.
    """
    directory = Path(directory)
    whole = directory.resolve()
    if whole.name in PLACES and not (directory / "report.json").is_file() and (whole.parent / "report.json").is_file():
        return RunReport.load(whole.parent), f"{whole.parent.name}/{whole.name}"
    return RunReport.load(directory), whole.name


def check_cards(directory: str | Path) -> None:
    """Checks that `write_cards` finds a model or an adapter and would not overwrite a text of the user.

    Raises:
        ValueError: there is no model or adapter, or a README.md is neither a card of hf_cod nor PEFT's template.
    """
    found = places(directory)
    if not found:
        raise ValueError(f"directory: expected one with a model or an adapter, got {str(directory)!r}")
    for readme in (place / CARD for place in found):
        text = read_text(readme, "directory", errors="replace") if readme.is_file() else TAG
        if TAG not in text and TEMPLATE not in text:
            raise ValueError(f"directory: expected no README.md of other origin, got {str(readme)!r}; move it away")


def result_card(
    directory: Path,
    report: RunReport,
    name: str,
    command: str | None,
    settings: CardSettings | None = None,
    meanings: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of the model or adapter in one directory."""
    settings, loading, before = settings or CardSettings(), loading_of(directory, name), inherited(source_of(report))
    parts = [
        f"# {escaped(name)}",
        _what(report, loading, before),
        _use(loading),
        _made(report, command, meanings),
        _figures(report),
        *_pictures(directory),
    ]
    header = f"---\n{_metadata(report, loading, settings, before).to_yaml()}\n---\n\n"
    return ModelCard(header + "\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=True)


def source_of(report: RunReport) -> str:
    """The input model of a run, as the user named it."""
    return next((str(report.settings[key]) for key in SOURCES if report.settings.get(key)), report.model)


def _metadata(report: RunReport, loading: Loading, settings: CardSettings, before: Inherited) -> ModelCardData:
    candidates = [loading.base, source_of(report), report.settings.get("teacher"), before.base]
    base = next((found for found in (hub_id(str(each)) for each in candidates if each) if found), None)
    kind = QUANTIZED if "hf_cod" in loading.install and loading.base is None else None
    more: dict[str, Any] = {} if base is None else {"base_model": base}
    if base is not None and (kind or loading.base is not None):
        more["base_model_relation"] = kind or "adapter"
    return ModelCardData(
        language=settings.language,
        license=settings.license if settings.license != "other" else before.license,
        library_name=loading.library,
        pipeline_tag=loading.pipeline_tag,
        tags=["hf_cod", TAG, report.kind],
        **more,
    )


def _what(report: RunReport, loading: Loading, before: Inherited) -> str:
    source, base = source_of(report), hub_id(source_of(report))
    shown = escaped(public_name(source))
    shown = f"[{shown}](https://huggingface.co/{base})" if base else shown
    what = WHAT.get(report.kind, f"after {report.kind}")
    terms = f" The licence of {shown} is {before.license}." if before.license else ""
    return f"{'An adapter for ' if loading.base is not None else ''}{shown}, {what} by hf_cod.{terms}"


def _use(loading: Loading) -> str:
    lines = ["## Load it\n", "```sh", loading.install, "```\n", "```python", loading.python, "```\n", *loading.remarks]
    return "\n".join(lines)


def _made(report: RunReport, command: str | None, meanings: Mapping[str, str] | None) -> str:
    lines = ["## How it was made\n"]
    if command is not None:
        lines += ["```sh", command, "```\n"]
    rows = [(name, value) for name, value in report.settings.items() if value not in (None, [], {})]
    if meanings is None:
        lines += ["| setting | value |\n|---|---|"]
        lines += [f"| {escaped(name)} | {_shown(value)} |" for name, value in rows]
    else:
        lines += ["The main settings, and others that are not the defaults; `report.json` of the run has all.\n"]
        lines += ["| setting | value | meaning |\n|---|---|---|"]
        lines += [f"| {escaped(n)} | {_shown(v)} | {escaped(meanings[n])} |" for n, v in rows if n in meanings]
    versions = ", ".join(escaped(f"{key} {value}") for key, value in report.environment.items())
    return "\n".join([*lines, f"\nMade with {versions}."])


def public_value(value: Any) -> Any:
    """The value of a setting without local paths."""
    if isinstance(value, (list, tuple)):
        return [public_value(each) for each in value]
    return public_name(value) if isinstance(value, str) else value


def _shown(value: Any) -> str:
    found = public_value(value)
    return escaped(", ".join(map(str, found)) if isinstance(found, list) else found)


def _figures(report: RunReport) -> str:
    rows = [*_numbers(report.results)]
    lines = ["## Results\n", *[f"- {escaped(line)}" for line in report.summary]]
    if rows:
        lines += ["\n| figure | value |\n|---|---|", *[f"| {escaped(name)} | {value} |" for name, value in rows]]
    if report.notes:
        lines += ["\nNotes:\n", *[f"- {escaped(note)}" for note in report.notes]]
    return "\n".join(lines)


_NOT_SHOWN = (
    *("modules", "module_sparsity", "module_bits", "score", "score_settings", "evaluation", "plan"),
    "memory_limit",  # of the machine that made the model
)


def _numbers(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of results that are one number, or one number per model; longer results are only in report.json."""
    for name, value in results.items():
        shown, found = name.replace("_", " "), value if isinstance(value, dict) else {"": value}
        if name not in _NOT_SHOWN:
            for part, number in found.items():
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    figure = f"{number:,}" if isinstance(number, int) else format_number(number)
                    yield f"{shown}, {part}" if part else shown, figure


def _pictures(directory: Path) -> list[str]:
    drawn = sorted(path for path in directory.iterdir() if path.suffix in (".png", ".svg"))
    return ["\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in drawn)] if drawn else []
