"""Files that survive an interruption: what stands there is whole, the earlier or the new one."""

import json
import os
import stat
from dataclasses import dataclass, field

import pytest

from hf_cod.io import files
from hf_cod.io.files import JsonFile, append_line, fingerprint, looks_local
from hf_cod.io.journal import Journal, check_journal


@dataclass(frozen=True)
class Record(JsonFile):
    FIELD = "record"

    name: str
    values: list[float] = field(default_factory=list)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_once_it_is_on_disk(tmp_path, monkeypatch):
    happened = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: happened.append(name) or real(*a))
    path = files.write_text(tmp_path / "new" / "a.txt", "é")
    assert happened == ["fsync", "replace"] and path.read_bytes() == "é".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and names(path.parent) == ["a.txt"]
    assert files.copy_aside(path, tmp_path / "b.txt").read_text() == "é"


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(ZeroDivisionError):
        files.write_aside(path, lambda file: file.write(b"half") and 1 / 0)
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["a.json"]


def test_a_directory_takes_its_name_at_the_end(tmp_path):
    with files.directory_aside(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path / "out") == ["a"] and stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    with pytest.raises(OSError), files.directory_aside(tmp_path / "out") as aside:
        (aside / "b").write_text("2")
    with pytest.raises(ZeroDivisionError), files.directory_aside(tmp_path / "other") as aside:
        (aside / "b").write_text(str(1 / 0))
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = Record("a", [1.5]).save(tmp_path / "record.json")
    assert Record.load(path) == Record("a", [1.5])
    path.write_text('{"format": 1, "name": "earlier"}')
    assert Record.load(path) == Record("earlier"), "what came later has its default"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "record: expected a file, got"),
        ("{", "record: expected JSON, got"),
        ("[1]", r"record: expected named entries, got \[1\] in"),
        ('{"name": "a"}', "record: expected format 1, got none in"),
        ('{"format": 2, "name": "a"}', "record: expected format 1, got 2"),
        ('{"format": 1}', "record: expected name, values, got no name in"),
        ('{"format": 1, "name": "a", "other": 1}', "record: expected name, values, got 'other' in"),
    ],
)
def test_what_is_no_record(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Record.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name, local",
    [
        ("gpt2", False),
        ("Qwen/Qwen3", False),
        ("./a", True),
        ("~/a", True),
        ("/a", True),
        ("a/b/c", True),
        ("a\\b", True),
    ],
)
def test_names_that_can_only_be_paths(name, local):
    assert looks_local(name) == local


def test_equal_work_has_an_equal_fingerprint():
    first = fingerprint({"a": 1, "b": [2]}, "x")
    assert first == fingerprint({"b": [2], "a": 1}, "x") and len(first) == 16
    assert len({first, fingerprint({"a": 1, "b": [2]}), fingerprint({"a": 1, "b": [3]}, "x")}) == 3


def test_a_journal_keeps_the_lines_of_other_work_and_drops_what_was_cut(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    mine, other = Journal(path, "mine"), Journal(path, "other")
    mine.add("a", [1, None])
    other.add("a", 2)
    whole = path.read_text()
    path.write_text(whole + '["mine", "b", 3')
    again = Journal(path, "mine")
    assert again.entries == {"a": [1, None]} and "b" not in again and again.get("b") is None
    assert path.read_text() == whole, "so that the next line begins at a line's beginning"
    again.add("b", 3)
    assert Journal(path, "mine")["b"] == 3 and Journal(path, "other").entries == {"a": 2}


def test_a_journal_holds_a_result_once(tmp_path):
    """A resumed run may add a result that it has read."""
    path = tmp_path / "journal.jsonl"
    Journal(path, "mine").add("a", [1.5, None])
    journal = Journal(path, "mine")
    journal.add("a", (1.5, None))
    assert len(path.read_text().splitlines()) == 1
    journal.add("a", 2)
    assert Journal(path, "mine")["a"] == 2


def test_a_journal_without_a_path_lives_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, "mine")
    journal.add("a", 1)
    assert journal["a"] == 1 and names(tmp_path) == []


def test_a_line_is_not_appended_through_a_link(tmp_path):
    (tmp_path / "journal.jsonl").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ValueError, match=r"^output: expected a file of hf_cod, got '.*journal\.jsonl', a link"):
        append_line(tmp_path / "journal.jsonl", "{}")
    with pytest.raises(ValueError, match=r"^output: expected a journal of hf_cod, got '.*', a broken link; remove it$"):
        check_journal(tmp_path / "journal.jsonl")
    assert not (tmp_path / "outside.txt").exists()
