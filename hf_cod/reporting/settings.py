"""Settings of model cards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked


@checked
@dataclass
class CardSettings:
    """Entries of a model card that the run's report does not contain."""

    name: str = field(default="", metadata={"help": "name or Hub id of the model; default: name of the directory"})
    license: str = field(default="other", metadata={"help": "licence of the weights, as an identifier of the Hub"})
    sources: str | None = field(
        default=None,
        metadata={"help": "sources.json of examples/pretraining_text.py: the texts and their licences; default: none"},
    )
    language: str | None = field(
        default=None, metadata={"help": "language code of the text, such as en; default: not in the card"}
    )
    where: str | None = field(
        default=None, metadata={"help": "Markdown text for the card: where to download the model; default: none"}
    )
    comparison: str | None = field(
        default=None,
        metadata={"help": "comparison.md of examples/compare_placements.py, to include in the card; default: none"},
    )


class CardFields(TypedDict, total=False):
    """Fields of `CardSettings` that `release` takes by name."""

    name: str
    license: str
    sources: str | None
    language: str | None
    where: str | None
    comparison: str | None
