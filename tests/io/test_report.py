import json
import math

import pytest

from hf_cod import RunReport
from hf_cod.io.report import format_number, standing_out
from tests.reporting.reports import report


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


def test_layers_stand_out_only_from_unequal_ones():
    assert standing_out([1.0, 5.0, None, 3.0, math.inf, 2.0], 2) == [1, 3]
    assert standing_out([1.0, 5.0, 3.0], 2, least=True) == [0, 2]
    assert standing_out([4.0, 1.0, 1.0, 1.0], 2) == [0], "which second one would be arbitrary"
    assert standing_out([1.0] * 5, 3) == standing_out([0.70001, 0.70002, 0.7], 2) == []


@pytest.mark.parametrize(
    "results",
    [
        {"intervals": "x"},
        {"intervals": {"variance": "x"}},
        {"intervals": {"variance": [["x", 1.0]]}},
        {"intervals": {"variance": [[1.0]]}},
        {"curve": [["x"]]},
        {"curve": [[1, 2.0, 3.0]]},
        {"validation": 7},
    ],
)
def test_results_that_plots_read_are_checked(results, tmp_path):
    path = RunReport("diagnose", "m", {}, {}, {"variance": [1.0]}, {}).save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "results": results}))
    with pytest.raises(ValueError, match=rf"results\.{next(iter(results))}.*: expected"):
        RunReport.load(tmp_path)
