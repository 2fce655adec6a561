"""What the scripts of a page compute, in node or in a Chromium."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from hf_cod.reporting.html.page import PLACE
from tests.browser import NODE, Browser

FORMULAS = (PLACE / "allocation.js").read_text(encoding="utf-8")


def in_node(expression: str):
    """The value of an expression after the script of formulas."""
    code = f"{FORMULAS}\nprocess.stdout.write(JSON.stringify({expression}));"
    done = subprocess.run([str(NODE), "-"], input=code, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def in_chromium(expression: str, folder: Path):
    """The same, in a page without anything else."""
    page = folder / "formulas.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><script>{FORMULAS}</script>", encoding="utf-8")
    browser = Browser(folder / "profile")
    try:
        browser.open(page)
        return json.loads(browser.value(f"JSON.stringify({expression})"))
    finally:
        browser.close()
