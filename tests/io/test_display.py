"""Names from strangers: on a terminal and in messages they are what they read, and do nothing."""

import logging
import shutil
import subprocess
import sys
import warnings

import pytest

from hf_cod.cli import main
from hf_cod.io.display import one_line, shell_word, terminal_text
from tests.reporting.reports import report

# Name -> how a terminal shows it.
NAMES = {
    "llama-7b_v2.1": "llama-7b_v2.1",
    "llama[v2]": "llama[v2]",
    "[/red]": "[/red]",
    "[bold]x[/bold]": "[bold]x[/bold]",
    "[link=https://e.org]x[/link]": "[link=https://e.org]x[/link]",
    "a:smile:b": "a:smile:b",
    "back\\slash\\": "back\\slash\\",
    "\x1b[31mred": r"\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b2J": r"\x9b2J",
    "bell\a back\b": r"bell\x07 back\x08",
    "two\nlines\r": r"two\nlines\r",
    "nul\x00": r"nul\x00",
    "\u202egnp.exe": r"\u202egnp.exe",
    "line\u2028end": r"line\u2028end",
    "zero\ufeffwidth": r"zero\ufeffwidth",
    "half\ud800": r"half\ud800",
    "naïve-日本語-🦙": "naïve-日本語-🦙",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_shows_control_characters_and_obeys_none(name):
    assert terminal_text(name) == NAMES[name]
    assert terminal_text(NAMES[name]) == NAMES[name], "once is enough"


def test_lines_of_a_message_stay_or_become_one():
    assert terminal_text("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert one_line("a\nb\x1b") == r"a b\x1b"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "half\ud800"])  # which no file of ours can hold
def test_commands_show_names_in_reports_as_they_read(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for folder in ("a", "b"):
        report(kind="diagnose", model=name, summary=[f"About {name}."], notes=[name]).save(tmp_path / folder)
    runs = [str(tmp_path / folder) for folder in ("a", "b")]
    assert main(["compare", *runs, "--no-plots", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert NAMES[name] in shown and not set(shown) & set("\x1b\x9b\a\b\0\r\u202e\u2028\ufeff")
    assert main(["compare", runs[0], "--output", str(tmp_path / "out2")]) == 2
    shutil.rmtree(runs[1])
    assert main(["compare", runs[0], name, "--output", str(tmp_path / "out2")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and not set(errors) & set("\x1b\x9b\a\b\0\r\u202e\u2028\ufeff")


def test_a_report_is_printed_with_its_names_as_they_read(capsys, monkeypatch):
    from hf_cod.cli.terminal import print_report

    monkeypatch.setenv("COLUMNS", "300")
    for name, shown in NAMES.items():
        print_report(report(model=name, summary=[name], notes=[name]))
        assert capsys.readouterr().out.count(shown) == 3, name


def test_warnings_that_a_command_gives_are_harmless(capsys, monkeypatch):
    def command(arguments):
        logging.getLogger("hf_cod.somewhere").warning("%s held a report", "\x1b[2J")
        return 0

    monkeypatch.setattr("hf_cod.cli.commands.env.main", command)
    assert main(["env"]) == 0
    assert capsys.readouterr().err == "hf-cod env: warning: \\x1b[2J held a report\n"


@pytest.mark.parametrize("name", [name for name in NAMES if "\x00" not in name and "\ud800" not in name])
def test_a_shell_reads_a_quoted_name_as_it_was_and_a_terminal_obeys_nothing_in_it(name):
    word = shell_word(name)
    assert terminal_text(word) == word
    command = f"LC_ALL=C.UTF-8; printf %s {word}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout.decode() == name


def test_warnings_of_other_libraries_are_one_harmless_line(capsys, monkeypatch):
    def warn(_):
        warnings.warn("Glyph 27 (\x1b[31m) is\nmissing", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("hf_cod.cli.commands.compare.main", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _print_warning)
        assert main(["compare"]) == 0
    assert capsys.readouterr().err == "Glyph 27 (\\x1b[31m) is missing\n"


def _print_warning(message, category, *where):
    print(message, file=sys.stderr)
