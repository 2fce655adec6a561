"""The page of faults by kind names tests that there are."""

import ast
import re

from tests.docs.pages import DOCS, ROOT


def named():
    """(file, test or None) of each row of the table, in order."""
    rows = [line for line in (DOCS / "benchmarks/architecture-faults.md").read_text(encoding="utf-8").splitlines()]
    for row in (row for row in rows if row.startswith("| ") and "test_" in row):
        file = ""
        for path, test in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", row.rpartition(" | ")[2]):
            file = path or file
            yield file, test


def test_each_row_has_tests_that_there_are():
    found = [*named()]
    assert len(found) >= 35
    for file, test in found:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test == "" or test in defined, f"{file}: {test}"
