"""Every `load`, `plot` and `load_texts` refuses a path of another kind with one line that names field and path."""

import json

import pytest

import hf_cod
from hf_cod import (
    DepthPlan,
    ExpertPlan,
    ExpertScores,
    FitPlan,
    LayerAllocation,
    LayerScores,
    LayerStatistics,
    RankPlan,
    RepeatPlan,
    RunReport,
    TrainingHistory,
    WidthPlan,
    compare,
    load_texts,
)

FIELDS = {
    DepthPlan: "depth_plan",
    ExpertPlan: "expert_plan",
    ExpertScores: "expert_scores",
    FitPlan: "fit_plan",
    LayerAllocation: "allocation",
    LayerScores: "scores",
    LayerStatistics: "statistics",
    RankPlan: "rank_plan",
    RepeatPlan: "repeat_plan",
    RunReport: "report",
    TrainingHistory: "history",
    WidthPlan: "width_plan",
}
RAW = ("Errno", "os error", "No such", "Is a directory")


@pytest.fixture
def others(tmp_path):
    """Kind -> a path that is nothing of ours."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "a.json").write_text("{} and more")
    (tmp_path / "text.txt").write_text("the dog ran")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "other.json").write_text(json.dumps({"format": 99}))
    names = ("directory", "missing.json", "text.txt", "empty.json", "binary.json", "other.json")
    return {name: tmp_path / name for name in names}


def refused(call, field, path):
    with pytest.raises(ValueError, match=rf"^{field}( line \d+)?: expected .*, got ") as caught:
        call()
    told = str(caught.value)
    assert "\n" not in told and repr(str(path))[1:-1] in told
    return told


def test_every_class_that_loads_is_in_the_table():
    public = {getattr(hf_cod, name) for name in hf_cod.__all__}
    assert {thing for thing in public if isinstance(thing, type) and "load" in dir(thing)} == set(FIELDS)


@pytest.mark.parametrize("kind", FIELDS)
def test_load(kind, others):
    for path in others.values():
        told = refused(lambda path=path: kind.load(path), FIELDS[kind], path)
        assert not [raw for raw in RAW if raw in told], told


def test_load_says_what_is_there_instead(others):
    assert "which does not exist" in refused(
        lambda: LayerScores.load(others["missing.json"]), "scores", others["missing.json"]
    )
    assert "expected JSON, got other text: " in refused(
        lambda: LayerScores.load(others["text.txt"]), "scores", others["text.txt"]
    )
    assert "expected JSON, got an empty text" in refused(
        lambda: LayerScores.load(others["empty.json"]), "scores", others["empty.json"]
    )
    assert "which is a directory" in refused(
        lambda: LayerStatistics.load(others["directory"]), "statistics", others["directory"]
    )


@pytest.mark.parametrize("name", ["directory", "missing.json", "empty.json", "binary.json"])
def test_load_texts(name, others):
    pytest.importorskip("datasets")
    refused(lambda: list(load_texts(text=str(others[name]))), "text", others[name])


def test_load_texts_of_rows_without_the_column(others):
    pytest.importorskip("datasets")
    with pytest.raises(
        ValueError, match=r"^text_column: expected the column of plain text, .*; got the columns format"
    ):
        list(load_texts(text=str(others["other.json"])))


@pytest.mark.parametrize("name", ["text.txt", "binary.json"])
def test_plot_into_a_file(name, others):
    pytest.importorskip("matplotlib")
    report = RunReport("diagnose", "m", {}, {}, {"gradient_norm": [1.0, 2.0]}, {})
    before = others[name].read_bytes()
    for plotted in (report, compare([report, report], ["a", "b"])):
        told = refused(lambda plotted=plotted: plotted.plot(others[name]), "directory", others[name])
        assert told.endswith("which is a file")
    assert others[name].read_bytes() == before


@pytest.mark.parametrize("name", ["directory", "missing.json"])
def test_plot_into_a_directory(name, others):
    pytest.importorskip("matplotlib")
    report = RunReport("diagnose", "m", {}, {}, {"gradient_norm": [1.0, 2.0]}, {})
    report.plot(others[name])
    assert (others[name] / "gradient_norm.png").is_file()


def test_merge_names_what_it_takes(others):
    with pytest.raises(ValueError, match=r"^parts: expected a list of LayerStatistics, got LayerScores$"):
        LayerStatistics.merge(LayerScores("m", "uniform", [1.0], [1]))
