"""What a model card can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked


@checked
@dataclass
class CardSettings:
    """What a model card says that the run's report does not know."""

    name: str = field(default="", metadata={"help": "name of the model, or its Hub id; default: the directory's"})
    license: str = field(default="other", metadata={"help": "licence of the weights, as the Hub spells it"})
    sources: str | None = field(
        default=None, metadata={"help": "sources.json of examples/pretraining_text.py: the texts and their licences"}
    )
    language: str | None = field(default=None, metadata={"help": "language of the text, as the Hub spells it: en"})
    where: str | None = field(
        default=None, metadata={"help": "Markdown that says how to get this directory; default: it is at hand"}
    )
    comparison: str | None = field(
        default=None, metadata={"help": "comparison.md of examples/compare_placements.py, to show in the card"}
    )


class CardFields(TypedDict, total=False):
    """Fields of `CardSettings` that `release` takes by name."""

    name: str
    license: str
    sources: str | None
    language: str | None
    where: str | None
    comparison: str | None
