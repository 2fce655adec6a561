import json
import math

import pytest

from hf_cod import RunReport, compare
from hf_cod.io.report import format_number, standing_out


def report(**changes) -> RunReport:
    values = {
        "kind": "diagnose",
        "model": "tiny",
        "settings": {"seed": 0},
        "environment": {"torch": "2"},
        "layers": {
            "angular_distance": [0.4, 0.1],
            "layer_drop": [5.0, math.inf],
            "gradient_norm": [1.0, 3.0],
            "variance": [1.0, 900.0],
        },
        "results": {
            "angular_distance": [[0.4, 0.5], [0.1, None]],
            "effective_depth": {"value": 1.4, "low": 1.3, "high": 1.5, "confidence": 0.95},
            "late_share": 0.2,
            "layer_drop": {"metric": "perplexity", "lower_is_better": True, "intact": 10.0, "without": [15.0, 1e6]},
        },
        "summary": ["Effective depth 1.4 of 2 layers."],
        "notes": ["something was left out"],
    }
    return RunReport(**{**values, **changes})


def test_round_trip_in_strict_json(tmp_path):
    path = report().save(tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert RunReport.load(tmp_path) == RunReport.load(path) == report()


def test_a_report_of_another_run_is_moved_not_replaced(tmp_path):
    report().save(tmp_path)
    (tmp_path / "overview.png").write_bytes(b"old")
    (tmp_path / "mine.txt").write_text("not ours")
    assert report(summary=["again"]).keep_earlier(tmp_path) is None, "same run"
    other = report(model="other")
    assert other.keep_earlier(tmp_path) == tmp_path / "earlier-1"
    assert other.keep_earlier(tmp_path) is None, "nothing left to move"
    other.save(tmp_path)
    assert report(settings={"seed": 1}).keep_earlier(tmp_path) == tmp_path / "earlier-2"
    assert RunReport.load(tmp_path / "earlier-1") == report() and RunReport.load(tmp_path / "earlier-2") == other
    assert (tmp_path / "earlier-1" / "overview.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "mine.txt"]


def test_a_number_freed_in_between_is_not_taken_twice(tmp_path):
    (tmp_path / "earlier-2").mkdir()
    report().save(tmp_path)
    assert report(model="other").keep_earlier(tmp_path) == tmp_path / "earlier-3"


def test_a_metric_that_is_no_number_can_still_be_drawn_and_compared(tmp_path):
    drop = {"metric": "mine", "lower_is_better": True, "intact": math.nan, "without": [math.nan, math.nan]}
    report(results={**report().results, "layer_drop": drop}).save(tmp_path)
    found = RunReport.load(tmp_path)
    found.plot(tmp_path)
    rows = {row[0]: row[1] for row in compare([found, found]).rows}
    assert rows["metric of the intact model"] == rows["worst removal of one layer"] == "-"


def test_page_holds_table_findings_and_pictures(tmp_path):
    original = report()
    original.plot(tmp_path)
    original.save(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for piece in (
        "| layer | angular distance |",
        "| 0 | 0.4 |",
        "- Effective depth",
        "![overview](overview.png)",
        "left out",
    ):
        assert piece in page


def test_pictures_are_written(tmp_path):
    report().plot(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{n}.png" for n in ("overview", "angular_distance", "layer_drop", "gradient_norm", "variance")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_near_is_yellow_and_empty_cells_are_blank():
    figure = report().plot()
    image = figure.axes[0].images[0]
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert red > 0.9 and green > 0.8 and blue < 0.3, "distance 0 is yellow"
    # imshow takes rows: row n - 1, column l.
    assert image.get_array().tolist() == [[0.4, 0.1], [0.5, None]]
    assert list(image.get_extent()) == [-0.5, 1.5, 0.5, 2.5]


def test_a_report_of_other_measures_is_told():
    with pytest.raises(ValueError, match="expected measures to draw, got none"):
        report(layers={}, results={}).plot()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', "{}"])
def test_bad_reports(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="report: expected"):
        RunReport.load(tmp_path)


def test_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"expected a directory with a report.json"):
        RunReport.load(tmp_path / "nothing")


def test_numbers_for_people():
    assert format_number(1.5e9) == "1.5e+09"
    assert [format_number(v) for v in (None, math.nan, 0.123456, 12345.6, 7)] == ["-", "-", "0.1235", "12,346", "7"]


def test_compare_reads_figures_of_each_run(tmp_path):
    other = report(model="other", results={}, layers={"gradient_norm": [2.0, 1.0, 1.0]})
    comparison = compare([report(), other], ["a", "b"])
    table = {row[0]: row[1:] for row in comparison.rows}
    assert table["layers"] == ["2", "3"]
    assert table["effective depth"] == ["1.4 (1.3 to 1.5)", "-"]
    assert table["late half's share of gradient norm"] == ["0.75", "0.375"]
    assert table["worst removal of one layer"] == ["1,000,000 (perplexity)", "-"]
    comparison.plot(tmp_path)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| effective depth | 1.4 (1.3 to 1.5) | - |" in comparison.to_markdown()


@pytest.mark.parametrize(
    "reports, labels, message",
    [
        ([report()], None, "at least two, got 1"),
        ([report(), report(kind="prune")], None, "got one of prune"),
        ([report(), report()], ["x"], "expected 2, one for each run, got 1"),
    ],
)
def test_compare_refuses(reports, labels, message):
    with pytest.raises(ValueError, match=message):
        compare(reports, labels)


def test_what_could_not_be_measured_is_left_blank(tmp_path):
    holes = report(
        layers={"layer_drop": [1.0, math.nan], "variance": [math.nan, 2.0]},
        results={
            "layer_drop": {"metric": "perplexity", "lower_is_better": True, "intact": 1.0, "without": [2.0, math.nan]}
        },
    )
    holes.save(tmp_path)
    RunReport.load(tmp_path).plot(tmp_path)
    compare([RunReport.load(tmp_path)] * 2).plot(tmp_path)
    assert {"layer_drop.png", "compare.png"} <= {path.name for path in tmp_path.iterdir()}


def test_block_influence_alone_has_a_picture(tmp_path):
    report(layers={"block_influence": [0.1, 0.2]}, results={}).plot(tmp_path)
    assert (tmp_path / "block_influence.png").is_file()


def test_a_notebook_shows_the_figure():
    assert report().plot()._repr_png_().startswith(b"\x89PNG")


def scored(values, method="owl", found=None, **settings):
    settings = {"method": method, "threshold": 5.0, **settings}
    return report(kind="score", settings=settings, layers={"score": values}, results={"score": found or {}})


def pruned(values, mean):
    return report(kind="prune", settings={"method": "wanda"}, layers={"sparsity": values}, results={"sparsity": mean})


def colours(axes):
    return [bar.get_facecolor() for bar in axes.patches]


def test_layers_stand_out_only_from_unequal_ones():
    assert standing_out([1.0, 5.0, None, 3.0, math.inf, 2.0], 2) == [1, 3]
    assert standing_out([1.0, 5.0, 3.0], 2, least=True) == [0, 2]
    assert standing_out([4.0, 1.0, 1.0, 1.0], 2) == [0], "which second one would be arbitrary"
    assert standing_out([1.0] * 5, 3) == standing_out([0.70001, 0.70002, 0.7], 2) == []


def test_layers_that_are_marked_are_named_below():
    axes = scored([0.5, 0.1, 0.4, 0.2, 0.3]).plot().axes[0]
    assert axes.get_xlabel() == "layer (dark, the largest: 0, 2, 4)"
    dark, pale = colours(axes)[0], colours(axes)[1]
    assert colours(axes) == [dark, pale, dark, pale, dark] and dark != pale
    equal = pruned([0.7] * 5, 0.7).plot().axes[0]
    assert len(set(colours(equal))) == 1 and equal.get_xlabel() == "layer"
    assert not [text for text in axes.texts if text.get_text()], "no numbers over bars, which would read as values"


def test_layers_are_whole_numbers():
    results = {"angular_distance": [[0.1, 0.2, 0.3], [0.1, 0.2, None], [0.1, None, None]]}
    few = report(layers={"gradient_norm": [1.0, 2.0, 3.0], "angular_distance": [0.1] * 3}, results=results)
    angles, bars = few.plot().axes[:2]
    for axis in (angles.xaxis, angles.yaxis, bars.xaxis):
        assert all(tick == int(tick) for tick in axis.get_ticklocs())


def test_what_a_score_is_and_what_auto_chose():
    axes = scored([0.1, -0.2], "auto", {"chosen": "sensitivity", "spread": 0.25}).plot().axes[0]
    assert axes.get_title() == "Score of each layer: auto, which chose sensitivity (λ = 0.25)"
    assert axes.get_ylabel() == "growth of the loss, nats a token"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 0]], "where negative scores begin"
    given = scored([1.0, 2.0], scores="somewhere/scores.json").plot().axes[0]
    assert given.get_title() == "Score of each layer: scores.json" and given.get_ylabel() == "score"
    assert scored([1.0, 2.0]).plot().axes[0].get_ylabel() == "share of outliers D$^l$"


def test_sparsity_says_what_the_dashed_line_is_and_that_nothing_is_zero():
    axes = pruned([0.6, 0.8], 0.71).plot().axes[0]
    assert axes.get_title() == "Sparsity of each layer by wanda (dashed: 71.0% of all weights)"
    axes = pruned([0.0, 0.0], 0.0).plot().axes[0]
    assert [text.get_text() for text in axes.texts] == ["0 in every layer"] and axes.get_ylim() == (0, 1)
    packed = report(kind="pack", settings={"minimum": 0.5}, layers={"sparsity": [0.6, 0.8]}, results={})
    assert packed.plot().axes[0].get_title() == "Sparsity of each layer"


def test_one_measure_is_one_picture(tmp_path):
    scored([1.0, 2.0]).plot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["score.png"]
