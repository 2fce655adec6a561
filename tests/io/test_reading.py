"""Whatever a file of ours holds: what its schema allows is read, the rest is one line that says what is wrong."""

import json
import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hf_cod import LayerScores, LayerStatistics, RunReport, TrainingHistory
from hf_cod.io.journal import Journal
from hf_cod.training.runs.run_directory import claim
from tests.io.mutations import HOSTILE, RECORDS, Raw, content_of, forbidden, mutated, places_of, put, text_of
from tests.reporting.reports import report

EXAMPLES = 60
LONG = [EXAMPLES, pytest.param(2500, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def check_refusal(error, path):
    """The standard form: one line, the field first, the file last."""
    assert re.fullmatch(r"\S[^\n]*: expected [^\n]*", str(error)) and repr(str(path)) in str(error), str(error)
    assert str(error).isprintable() and len(str(error)) < 1000, str(error)


def read(load, path):
    """The object, or None where it is refused."""
    try:
        return load(path)
    except ValueError as error:
        check_refusal(error, path)
        return None


@pytest.mark.parametrize("name", RECORDS)
def test_what_a_record_holds_comes_back(name, folder):
    record = RECORDS[name]
    assert type(record).load(record.save(folder / "whole.json")) == record


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_refuses_what_its_schema_forbids(name, folder):
    record, path = RECORDS[name], folder / f"{name}.json"
    wrong = forbidden(type(record), content_of(record, folder))
    assert len(wrong) > 20
    for what, content in wrong.items():
        path.write_text(text_of(content))
        with pytest.raises(ValueError) as found:
            pytest.fail(f"{what}: {type(record).load(path)}")
        check_refusal(found.value, path)


@pytest.mark.parametrize("examples", LONG)
@pytest.mark.parametrize("name", RECORDS)
def test_a_changed_record_is_refused_or_equal_to_what_it_says(name, examples, folder):
    record, path = RECORDS[name], folder / f"changed-{name}.json"

    @settings(max_examples=examples)
    @given(mutated(content_of(record, folder)))
    def check(raw):
        path.write_bytes(raw)
        found = read(type(record).load, path)
        if found is not None:
            told = json.loads(raw)
            del told["format"]
            assert {key: getattr(found, key) for key in told} == told
            assert type(record).load(found.save(folder / "again.json")) == found

    check()


def report_of(folder):
    return report(results={"late_share": 0.5}).save(folder)


@pytest.mark.parametrize("examples", LONG)
def test_a_changed_report_is_refused_or_can_be_shown(examples, folder):
    content = json.loads(report_of(folder).read_text())
    path = folder / "changed-report.json"

    @settings(max_examples=examples)
    @given(mutated(content))
    def check(raw):
        path.write_bytes(raw)
        found = read(RunReport.load, path)
        if found is not None:
            assert found.to_markdown() and RunReport.load(found.save(folder / "again")) == found

    check()


@pytest.mark.parametrize(
    "place, value",
    [
        (("layers", "variance"), 3),
        (("layers", "variance", 0), True),
        (("layers", "variance", 0), "1"),
        (("layers", "variance"), [0.5]),
        (("environment", "torch"), 2),
        (("summary",), "one"),
        (("notes", 0), None),
        (("settings",), []),
        (("results",), None),
        (("kind",), Ellipsis),
        (("format",), 2),
        (("extra",), 1),
    ],
)
def test_reports_refuse(place, value, folder):
    path = folder / "refused-report.json"
    path.write_text(json.dumps(put(json.loads(report_of(folder).read_text()), place, value)))
    with pytest.raises(ValueError) as found:
        RunReport.load(path)
    check_refusal(found.value, path)


HEADER = {"format": 1, "model": "m", "layers": 2, "settings": {"every": 10}, "probe": "abc"}
LINES = [
    {"step": step, "gradient_norm": [None, 0.5], "variance": [1.0, 2.0], "late_share": 0.4, "failure": None}
    for step in (10, 20)
]


@pytest.mark.parametrize("examples", LONG)
def test_a_changed_history_is_refused_or_can_be_reported(examples, folder):
    path = folder / "history.jsonl"

    @settings(max_examples=examples)
    @given(mutated([HEADER, *LINES]), st.booleans())
    def check(raw, whole):
        lines = raw.replace(b"}, {", b"}\n{").strip(b"[]")
        path.write_bytes(lines + b"\n" if whole else lines)
        found = read(TrainingHistory.load, path)
        if found is not None and found.lines:
            assert found.report().to_markdown()

    check()


@pytest.mark.parametrize(
    "line, change",
    [
        (0, {"format": 2}),
        (0, {"layers": True}),
        (0, {"layers": 10**12}),
        (0, {"model": None}),
        (0, {"settings": []}),
        (1, {"step": "10"}),
        (1, {"step": -1}),
        (1, {"variance": [1.0]}),
        (1, {"variance": [True, 1.0]}),
        (1, {"variance": 1.0}),
        (2, {"late_share": "0.5"}),
        (2, {"failure": 3}),
    ],
)
def test_histories_refuse(line, change, folder):
    lines = [HEADER, *LINES]
    lines[line] = {**lines[line], **change}
    path = folder / "refused.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    with pytest.raises(ValueError) as found:
        TrainingHistory.load(path)
    check_refusal(found.value, path)


def test_a_history_whose_last_line_was_cut_is_read_without_it(folder):
    path = folder / "cut.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in (HEADER, *LINES))[:-5])
    assert [line["step"] for line in TrainingHistory.load(path).lines] == [10]


SUMS = {"squares/layers.0.up": torch.rand(4).double(), "squares/layers.0.experts": torch.rand(2, 3).double()}
COUNTS = {"tokens/layers.0.up": torch.tensor(5), "tokens/layers.0.experts": torch.tensor([2, 3])}
TOLD = {"format": "1", "model": "m", "path": "layers"}
UP, COUNT = "squares/layers.0.up", "tokens/layers.0.up"


@pytest.mark.parametrize(
    "change, told",
    [
        ({UP: torch.rand(4)}, {}),
        ({UP: torch.rand(4).half()}, {}),
        ({UP: torch.arange(4)}, {}),
        ({UP: -torch.rand(4).double()}, {}),
        ({UP: torch.tensor([1.0, float("nan")]).double()}, {}),
        ({UP: torch.tensor([1.0, float("inf")]).double()}, {}),
        ({UP: torch.rand(1, 2, 3).double()}, {}),
        ({UP: torch.rand(0).double()}, {}),
        ({UP: None}, {}),
        ({COUNT: torch.tensor(-1)}, {}),
        ({COUNT: torch.tensor(5.0)}, {}),
        ({COUNT: torch.tensor([5])}, {}),
        ({COUNT: torch.tensor(5, dtype=torch.int32)}, {}),
        ({COUNT: torch.tensor(True)}, {}),
        ({COUNT: None}, {}),
        ({"other/layers.0.up": torch.rand(4).double()}, {}),
        ({"squares": torch.rand(4).double()}, {}),
        ({"squares/../../x": torch.rand(4).double(), "tokens/../../x": torch.tensor(1)}, {}),
        ({}, {"format": "2"}),
        ({}, {"format": None}),
        ({}, {"model": None}),
        ({}, {"path": None}),
    ],
)
def test_statistics_refuse(change, told, folder):
    tensors = {name: tensor for name, tensor in {**SUMS, **COUNTS, **change}.items() if tensor is not None}
    path = folder / "statistics.safetensors"
    path.write_bytes(save(tensors, {key: value for key, value in {**TOLD, **told}.items() if value is not None}))
    with pytest.raises(ValueError) as found:
        LayerStatistics.load(path)
    check_refusal(found.value, path)


@pytest.mark.parametrize("examples", LONG)
def test_statistics_of_changed_bytes_are_refused_or_sums(examples, folder):
    path = folder / "bytes.safetensors"
    whole = save({**SUMS, **COUNTS}, TOLD)

    @settings(max_examples=examples)
    @given(st.data())
    def check(data):
        place = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
        path.write_bytes(changed[: data.draw(st.sampled_from([place, len(whole)]))])
        found = read(LayerStatistics.load, path)
        if found is not None:
            assert all((sums >= 0).all() and sums.isfinite().all() for sums in found.squares.values())
            assert all((count >= 0).all() for count in found.tokens.values())

    check()


def test_a_header_that_promises_terabytes_is_refused_before_anything_is_allocated(folder):
    header = json.dumps(
        {UP: {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}, "__metadata__": TOLD}
    ).encode()
    path = folder / "terabytes.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ValueError) as found:
        LayerStatistics.load(path)
    check_refusal(found.value, path)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(folder):
    path = folder / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(ValueError, match=r"scores: expected at most .* bytes, got"):
        LayerScores.load(path)


def test_a_journal_that_is_too_large_is_refused_before_it_is_read_and_stays(folder):
    path = folder / "journal.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"journal: expected at most .* bytes, got") as found:
        Journal(path, "work")
    check_refusal(found.value, path)
    assert path.stat().st_size == 1 << 40


def test_lines_of_a_journal_that_end_as_on_windows_are_whole(folder):
    path = folder / "journal.jsonl"
    path.unlink(missing_ok=True)
    Journal(path, "work").add("key", 1)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Journal(path, "work").entries == {"key": 1}


@pytest.mark.parametrize("examples", LONG)
def test_a_changed_journal_is_refused_or_read(examples, folder):
    path = folder / "journal.jsonl"

    @settings(max_examples=examples)
    @given(mutated([["work", "key", [1.0, {"bytes": 3}]], ["other", "key", None]]))
    def check(raw):
        path.write_bytes(raw.replace(b"], [", b"]\n[")[1:-1] + b"\n")
        journal = read(lambda file: Journal(file, "work"), path)
        if journal is not None and "key" in journal:
            found = read(lambda file: journal.result("key", tuple[float, dict[str, int]]), path)
            assert found is None or isinstance(found[0], float)

    check()


def test_the_line_that_an_interruption_cut_is_dropped_and_a_strangers_file_stays(folder):
    path = folder / "journal.jsonl"
    path.write_text('["work", "a", 1]\n["work", "b", ')
    assert Journal(path, "work").entries == {"a": 1} and path.read_text() == '["work", "a", 1]\n'
    path.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError) as found:
        Journal(path, "work")
    check_refusal(found.value, path)
    assert path.read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "\x00", '{"a": 1e999}'])
def test_the_settings_of_a_run_that_cannot_be_read_are_refused_and_stay(content, folder):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "settings.json").write_text(content)
    with pytest.raises(ValueError) as found:
        claim(run, {"seed": 0})
    check_refusal(found.value, run / "settings.json")
    assert (run / "settings.json").read_text() == content


def test_mutations_reach_every_place():
    """Of the generator: what it changes is everywhere, and its wrong values are wrong JSON or right."""
    content = {"a": [1, {"b": 2}], "c": "d"}
    assert places_of(content) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert put(content, ("a", 1, "b"), Ellipsis) == {"a": [1, {}], "c": "d"}
    for value in HOSTILE:
        if not isinstance(value, Raw):
            assert json.loads(text_of(put(content, ("c",), value)))["c"] == value
