"""Escaping of text of foreign origin (names of models, directories and layers; notes) for a terminal."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from textwrap import shorten

# Control characters (ESC begins the escape sequences of terminals); invisible characters that end a line or change its
# direction (Unicode line separators and direction marks); and lone surrogates, which no encoding can print.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_IN_LINES = re.compile(f"(?![\n\t]){_HARMFUL.pattern}")


def terminal_text(text: object, *, lines: bool = False) -> str:
    r"""Replaces control characters by visible escapes, such as \x1b or \u202e.

    Args:
        text: the text to print.
        lines: whether line ends and tabs are left unchanged.
    """
    return (_IN_LINES if lines else _HARMFUL).sub(_shown, str(text))


def say(text: object) -> None:
    """Prints text with control characters escaped; line ends and tabs are left unchanged."""
    print(terminal_text(text, lines=True))


def one_line(text: object) -> str:
    """As `terminal_text`, with the lines of a message joined by spaces."""
    said = type(text).__name__ if isinstance(text, Exception) and not str(text) else str(text)
    return terminal_text(" ".join(said.split("\n")))


def named(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, separated by commas; an ellipsis stands for the others."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def shell_word(word: str) -> str:
    r"""A word of a shell command, quoted; with control characters, as bash and zsh read them ($'\x1b', $'\u202e')."""
    if not _HARMFUL.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_HARMFUL.sub(_in_shell, escaped)}'"


def _in_shell(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # stands for a byte that is not UTF-8 in the name of a file
        code -= 0xDC00
        return f"\\x{code:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def first_line(error: BaseException) -> str:
    """The first line of an error, for libraries whose errors end in traces; its type if it has no text."""
    return terminal_text((str(error).strip() or type(error).__name__).splitlines()[0])


def quoted(error: BaseException) -> str:
    """Type and beginning of a foreign error, to be quoted within a sentence."""
    return f"{type(error).__name__}: {shorten(first_line(error), 120, placeholder=' ...')}"


def _shown(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class HarmlessFormatter(logging.Formatter):
    """Log formatter that escapes control characters as `terminal_text` does."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted message with control characters escaped."""
        return terminal_text(super().format(record), lines=True)
