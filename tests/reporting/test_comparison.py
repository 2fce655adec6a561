import math

import pytest

from hf_cod import RunReport, compare
from tests.reporting.reports import report


def test_a_metric_that_is_no_number_can_still_be_drawn_and_compared(tmp_path):
    drop = {"metric": "mine", "lower_is_better": True, "intact": math.nan, "without": [math.nan, math.nan]}
    report(results={**report().results, "layer_drop": drop}).save(tmp_path)
    found = RunReport.load(tmp_path)
    found.plot(tmp_path)
    rows = {row[0]: row[1] for row in compare([found, found]).rows}
    assert rows["metric of the intact model"] == rows["worst removal of one layer"] == "-"


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
