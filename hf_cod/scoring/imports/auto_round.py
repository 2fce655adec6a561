"""AutoRound: `layer_config`, the result of AutoScheme: name of a module -> its settings, with bits."""

from __future__ import annotations

from typing import Any

from hf_cod.scoring.imports.numbers import NamedNumbers, bits_of


def layer_config(content: dict[str, Any]) -> NamedNumbers:
    """The bits of each module; one that is not quantized has 16."""
    return NamedNumbers("auto-round", {name: bits_of(settings, name) for name, settings in content.items()}, bits=True)
