"""The meanings of the columns of reports."""

import json
from pathlib import Path

from hf_cod.io.report import RunReport
from hf_cod.io.report_columns import MEANINGS, legend

REPORTS = sorted((Path(__file__).parents[1] / "earlier_files").glob("*/reports/*/report.json"))


def test_each_column_of_each_command_has_a_meaning():
    found = {name for path in REPORTS for name in json.loads(path.read_text())["layers"]}
    renamed = {"kept", "rank"}  # are now parameter_share and full_rank_share
    assert found > renamed and found - renamed <= MEANINGS.keys()


def test_the_page_explains_its_table_and_nothing_else():
    assert legend(["score", "someone's own"]) == [f"score: {MEANINGS['score']}"]
    report = RunReport("quantize", "m", {}, {}, {"four": [7, 0], "someone's own": [1, 2]}, {})
    page = report.to_markdown()
    assert f"- four: {MEANINGS['four']}" in page and page.count("someone") == 1
