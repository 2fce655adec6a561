"""Words of other people (names of models, directories and layers, notes) as a terminal may show them."""

from __future__ import annotations

import logging
import re

# Control characters, of which ESC begins the sequences that terminals obey; and what turns or ends lines unseen:
# Unicode's line ends and direction marks, and halves of surrogate pairs, which no encoding can print.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_IN_LINES = re.compile(f"(?![\n\t]){_HARMFUL.pattern}")


def terminal_text(text: object, *, lines: bool = False) -> str:
    r"""Text in which control characters are shown, as \x1b or \u202e, instead of being obeyed.

    Args:
        text: what is to be printed.
        lines: whether line ends and tabs stay as they are.
    """
    return (_IN_LINES if lines else _HARMFUL).sub(_shown, str(text))


def say(text: object) -> None:
    """Prints what may hold such words."""
    print(terminal_text(text, lines=True))


def one_line(text: object) -> str:
    """As `terminal_text`, with the lines of a longer message joined by a space."""
    said = type(text).__name__ if isinstance(text, Exception) and not str(text) else str(text)
    return terminal_text(" ".join(said.split("\n")))


def _shown(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class HarmlessFormatter(logging.Formatter):
    """Formats warnings as `terminal_text`."""

    def format(self, record: logging.LogRecord) -> str:
        """The message with control characters shown."""
        return terminal_text(super().format(record), lines=True)
