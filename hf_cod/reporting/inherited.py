"""What the card of a result takes over from the card of the model that it was made from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from hf_cod.reporting.loading import hub_id

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class Inherited:
    """Entries of a card's metadata.

    Attributes:
        license: identifier of the licence; None if the card has none.
        base: Hub id of the model that this one was made from; None if the card names none.
    """

    license: str | None = None
    base: str | None = None


def inherited(source: str) -> Inherited:
    """The entries of the card of a model in a directory; empty for a model on the Hub, which is linked.

    Cards come from strangers: entries of another form are left out.
    """
    path = Path(source).expanduser() / CARD
    if not path.is_file():
        return Inherited()
    try:
        found = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return Inherited()
    name, base = found.get("license"), found.get("base_model")
    known = isinstance(name, str) and _LICENSE.fullmatch(name) and name != "other"
    return Inherited(str(name) if known else None, hub_id(base) if isinstance(base, str) else None)
