import json
import math

import pytest

from hf_cod import TrainingHistory
from hf_cod.io.report import RunReport

HEADER = {"model": "m", "layers": 2, "settings": {"every": 10}, "probe": "abc"}


def line(step, variance=(1.0, 2.0), **more):
    return {"step": step, "gradient_norm": [1.0, 0.5], "variance": list(variance), "effective_depth": 1.5, **more}


def history_at(path, steps=(1, 10, 20, 30)):
    history = TrainingHistory(HEADER, path)
    history.start()
    for step in steps:
        history.add(line(step))
    return history


def test_a_line_is_on_disk_when_add_returns_and_comes_back(tmp_path):
    history = history_at(tmp_path / "run" / "history.jsonl", steps=(1,))
    history.add(line(10, [math.nan, math.inf]))
    loaded = TrainingHistory.load(tmp_path / "run")
    assert loaded.header == history.header and loaded.lines == history.lines
    assert loaded.lines[1]["variance"] == [None, None], "strict JSON knows no NaN"
    assert TrainingHistory.load(tmp_path).lines == loaded.lines, "the training's output directory will do"
    assert history.path.read_text().count("\n") == 3


def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(tmp_path):
    whole = history_at(tmp_path / "whole.jsonl").path.read_bytes()
    path = history_at(tmp_path / "killed.jsonl", steps=(1, 10, 20)).path
    path.write_bytes(path.read_bytes() + b'{"step": 30, "gradi')  # killed in the middle of writing
    resumed = TrainingHistory(HEADER, path)
    resumed.start(step=14)
    assert [entry["step"] for entry in resumed.lines] == [1, 10]
    for step in (20, 30):
        resumed.add(line(step))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "number, old, new, told",
    [
        (1, '"every": 10', '"every": 11', "line 1: .* move the file away to resume"),
        (1, '"probe": "abc"', '"probe": "abd"', "line 1: .* move the file away to resume"),
        (3, "[1.0, 2.0]", "[1.0, 3.0]", "line 3: .* remove the line to resume"),
        (3, '"step": 10', '"step": 14', "line 3: .* remove the line to resume"),
        (3, '"effective_depth"', '"effective_depti"', "line 3: .* remove the line to resume"),
        (3, '"checksum"', '"checksun"', "line 3: .* remove the line to resume"),
    ],
)
def test_a_damaged_line_is_refused_before_a_run_resumes(number, old, new, told, tmp_path):
    path = history_at(tmp_path / "history.jsonl").path
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    path.write_text("".join(lines))
    for work in (lambda: TrainingHistory.load(path), lambda: TrainingHistory(HEADER, path).start(20)):
        with pytest.raises(ValueError, match=rf"history {told} in '.*history\.jsonl'"):
            work()
    assert path.read_text() == "".join(lines)
    del lines[number - 1]
    if number > 1:
        path.write_text("".join(lines))
        assert [entry["step"] for entry in TrainingHistory.load(path).lines] == [1, 20, 30]


def test_a_history_without_checksums_is_continued_with_them(tmp_path):
    path = history_at(tmp_path / "history.jsonl").path
    as_now = path.read_text()
    lines = [json.loads(text) for text in as_now.splitlines()]
    for entry in lines:
        entry.pop("checksum")
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))  # as version 0.1 wrote it
    resumed = TrainingHistory(HEADER, path)
    resumed.start(step=20)
    resumed.add(line(30))
    assert path.read_text() == as_now


def test_an_earlier_run_is_kept_and_another_probe_refused(tmp_path):
    path = history_at(tmp_path / "h.jsonl").path
    for name, value in (("probe", "other"), ("layers", 3)):
        with pytest.raises(ValueError, match=f"history: expected {name} {value} as before, got"):
            TrainingHistory({**HEADER, name: value}, path).start(step=10)
    assert len(TrainingHistory.load(path).lines) == 4, "nothing was lost"
    TrainingHistory(HEADER, path).start()  # a run like the first may have had another learning rate
    assert TrainingHistory.load(path).lines == []
    TrainingHistory(HEADER, path).start()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["earlier-1", "h.jsonl"], "nothing was measured"
    kept = tmp_path / "earlier-1"
    assert len(TrainingHistory.load(kept / "h.jsonl").lines) == 4
    assert RunReport.load(kept).results["history"]["step"] == [1, 10, 20, 30], "though it had not come to its end"
    TrainingHistory({**HEADER, "settings": {"every": 5}}, tmp_path / "none" / "h.jsonl").start(step=10)


def test_without_a_file_it_stays_in_memory():
    history = TrainingHistory(HEADER)
    history.start()
    history.add(line(1))
    assert history.report().layers["variance"] == [1.0, 2.0]


def test_report_holds_every_measure_and_draws_heat_maps(tmp_path):
    history = history_at(tmp_path / "history.jsonl")
    history.add({"step": 40, "gradient_norm": None, "failure": "activations: infinite in layer 1"})
    report = history.report()
    assert report.kind == "training" and report.settings == {"every": 10, "probe": "abc"}
    assert report.results["history"]["step"] == [1, 10, 20, 30, 40]
    assert report.results["history"]["variance"] == [[1.0, 2.0]] * 4 + [None]
    assert report.layers == {"gradient_norm": [1.0, 0.5], "variance": [1.0, 2.0]}, "the last that was measured"
    assert "Effective depth, of 2 layers, went from 1.5 at step 1 to 1.5 at step 30." in report.summary
    assert report.notes == ["step 40: activations: infinite in layer 1"]
    figure = report.plot(tmp_path)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["Effective depth", "Gradient norm", "Output variance"]
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        f"{n}.png" for n in ("overview", *(f"{m}_by_step" for m in ("effective_depth", "gradient_norm", "variance")))
    }
    report.save(tmp_path)
    assert RunReport.load(tmp_path).results == report.results


def test_columns_of_a_heat_map_end_half_way_between_steps_and_at_the_outer_ones(tmp_path):
    figure = history_at(tmp_path / "h.jsonl", steps=(10, 20, 40)).report().plot()
    mesh = figure.axes[1].collections[0]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 15, 30, 40]
    single = history_at(tmp_path / "s.jsonl", steps=(7,)).report().plot()
    assert single.axes[1].collections[0].get_coordinates()[0, :, 0].tolist() == [6.5, 7.5]


@pytest.mark.parametrize(
    "content",
    ["", "{}\n", "[1]\n", '{"format": 1}\n{"no": "step"}\n', "not json\n"],
    ids=["empty", "bare", "list", "line", "text"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "h.jsonl").write_text(content)
    for path in ("h.jsonl", "none"):
        with pytest.raises(ValueError, match=r"history.*: expected"):
            TrainingHistory.load(tmp_path / path)


def test_other_formats_and_empty_histories_are_refused(tmp_path):
    (tmp_path / "h.jsonl").write_text(json.dumps({"format": 0}) + "\n")
    with pytest.raises(ValueError, match="history: expected format 1, got 0"):
        TrainingHistory.load(tmp_path / "h.jsonl")
    with pytest.raises(ValueError, match="history: expected at least one measured step"):
        TrainingHistory(HEADER).report()
