"""Escaping of text of foreign origin (names, notes) for Markdown."""

from __future__ import annotations

import re

from hf_cod.io.display import terminal_text

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore inside a word is no emphasis, and a bracket that no parenthesis or bracket follows is no link.
_MARKUP = re.compile(r"[\\`*|]|~~|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|!(?=\[)")
_BLOCK = re.compile(r"^(?:([#+-](?=[#\s])|[=-](?=[=\s-]+$))|(\d+)([.)])(?=\s|$))")


def escaped(text: object) -> str:
    """Text as one line of Markdown that renders literally: without HTML, links, tables or headings."""
    line = terminal_text(" ".join(str(text).split()))
    line = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], line)
    line = _MARKUP.sub(lambda found: "".join(f"\\{sign}" for sign in found[0]), line)
    return _BLOCK.sub(lambda found: f"\\{found[1]}" if found[1] else f"{found[2]}\\{found[3]}", line)
