"""Names of models, layers and metrics in the texts of plots."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hf_cod.io.display import terminal_text

# Warnings of matplotlib about characters that its font lacks (Chinese, emoji) or cannot arrange (Arabic).
_OF_FONTS = r"\s*(Glyph .* missing from|Matplotlib currently does not support .* natively)"


def literal(name: str) -> str:
    r"""A name for matplotlib, with control characters escaped.

    matplotlib reads text between two dollar signs as a formula unless they are written as \$.
    """
    return terminal_text(name).replace("$", r"\$")


@contextmanager
def fonts_silenced() -> Iterator[None]:
    """Hides matplotlib's warnings about characters of a name; it draws boxes in their places."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _OF_FONTS, UserWarning)
        yield
