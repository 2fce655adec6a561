"""The page as a file: complete, safe with any name, and without addresses."""

import json
import math
import re
from dataclasses import replace

import pytest

from hf_cod import RunReport, compare
from hf_cod.io.report import PAGE
from hf_cod.reporting.html.page import check_page
from hf_cod.reporting.plots.training_panels import LOG_RATIO
from tests.reporting.html.runs import HOSTILE, diagnosed
from tests.reporting.reports import report


def data_of(page: str):
    """What is embedded, as a browser finds it: the element ends at the first end tag."""
    (found,) = re.findall(r'<script type="application/json" id="report-data">(.*?)</script', page, re.S)
    return json.loads(found)


def test_the_page_has_all_numbers_of_the_report(tmp_path):
    for made in (diagnosed(5), report()):
        written = json.loads(made.save(tmp_path).read_text(encoding="utf-8"))
        (run,) = data_of(made.to_html())["runs"]
        assert run["report"] == written


def test_a_page_of_a_loaded_report_is_the_same(tmp_path):
    made = diagnosed(4, layers={"variance": [1.0, math.inf, 3.0, math.nan]}, results={})
    made.save(tmp_path)
    assert RunReport.load(tmp_path).to_html() == made.to_html()


def test_names_of_foreign_origin_cannot_leave_their_place():
    made = diagnosed(3, HOSTILE, notes=[HOSTILE], settings={HOSTILE: HOSTILE}, layers={HOSTILE: [1.0, 2.0, 3.0]})
    page = compare([made, made], [HOSTILE, "b"]).to_html()
    assert page.lower().count("<script") == 2 and page.lower().count("</script") == 2 and "<b>" not in page
    run = data_of(page)["runs"][0]
    assert run["label"] == HOSTILE and run["report"]["notes"] == [HOSTILE]


def test_the_page_loads_nothing():
    page = diagnosed(3).to_html()
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page and not re.search(r"\b(src|@import|url\()\s*=?", page.partition("</title>")[2])


def test_a_page_of_80_layers_is_small():
    assert len(compare([diagnosed(80), diagnosed(80)]).to_html().encode()) < 1_000_000


def test_the_page_has_the_logarithmic_scales_of_the_plots():
    assert f"const LOG_RATIO = {LOG_RATIO};" in diagnosed(3).to_html()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("angular_distance", [[0.1, 0.2], [0.1]], "angular_distance'.*expected 2 columns, as rows, got 1"),
        ("angular_distance", {"a": 1}, "angular_distance"),
        ("layer_parameters", ["many"], "layer_parameters"),
        ("layer_drop", {**report().results["layer_drop"], "without": [1.0]}, "layer_drop'.*expected 2 values, got 1"),
    ],
)
def test_results_of_another_form_are_refused(name, value, message):
    wrong = replace(report(), results={**report().results, name: value})
    with pytest.raises(ValueError, match=message):
        wrong.to_html()


def test_a_page_is_recognised_as_ours(tmp_path):
    (tmp_path / PAGE).write_text(report().to_html(), encoding="utf-8")
    check_page(tmp_path / PAGE)
    (tmp_path / PAGE).write_text("<!doctype html><p>mine", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a page of hf_cod"):
        check_page(tmp_path / PAGE)


def test_the_page_of_an_earlier_run_is_kept_with_its_report(tmp_path):
    first = report()
    first.save(tmp_path)
    (tmp_path / PAGE).write_text(first.to_html(), encoding="utf-8")
    report(model="other").keep_earlier(tmp_path)
    assert (tmp_path / "earlier-1" / PAGE).is_file() and not (tmp_path / PAGE).exists()
