"""A command on a terminal, and what one would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.fresh_processes import run_fresh

ROWS, COLUMNS = 200, 100
_ON_A_TERMINAL = (
    "import os, sys\n"
    "terminal = os.open(sys.argv.pop(1), os.O_RDWR | os.O_NOCTTY)\n"
    "for descriptor in (1, 2): os.dup2(terminal, descriptor)\n"
    "sys.stdout.reconfigure(line_buffering=True)\n"
    "from hf_cod.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)
# A carriage return, a line feed, a control sequence, or text without these.
_PIECES = re.compile(r"\r|\n|\x1b\[[\d;?]*[A-Za-z]|[^\r\n\x1b]+")


@dataclass
class Shown:
    """What a command wrote to its terminal, and its exit status."""

    status: int
    written: str

    def screens(self) -> Iterator[list[str]]:
        """The lines as they stood each time that the cursor was about to leave one, and at the end."""
        lines, row, column = [""], 0, 0
        for piece in _PIECES.findall(self.written):
            if piece in "\r\n" or piece.endswith("A"):
                yield [line.rstrip() for line in lines]
            if piece == "\r":
                column = 0
            elif piece == "\n":
                row += 1
            elif re.fullmatch(r"\x1b\[\d*A", piece):
                row = max(0, row - int(piece[2:-1] or 1))
            elif re.fullmatch(r"\x1b\[0?K", piece):
                lines[row] = lines[row][:column]
            elif re.fullmatch(r"\x1b\[[\d;]*m", piece):
                pass
            else:
                assert piece[0] != "\x1b", f"not emulated: {piece!r}"
                for character in piece:
                    if column == COLUMNS:
                        row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                    line = lines[row].ljust(column)
                    lines[row] = line[:column] + character + line[column + 1 :]
                    column += 1
            lines += [""] * (row + 1 - len(lines))
        yield [line.rstrip() for line in lines]

    @property
    def last(self) -> list[str]:
        """The lines that remain."""
        *_, last = self.screens()
        return last


def run_on_terminal(*arguments: object, environment: Mapping[str, str] | None = None) -> Shown:
    """Runs `hf-cod *arguments` with its output on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    parts: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, parts))
    reader.start()
    variables = {"TERM": "xterm-256color", **(environment or {})}
    done = run_fresh(_ON_A_TERMINAL, os.ttyname(theirs), *arguments, environment=variables)
    os.close(theirs)  # the last one: the reader comes to the end
    reader.join()
    os.close(ours)
    assert done.returncode in (0, 1, 2), done.stderr
    return Shown(done.returncode, b"".join(parts).decode())


def _read(descriptor: int, parts: list[bytes]) -> None:
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            return
        if not part:
            return
        parts.append(part)
