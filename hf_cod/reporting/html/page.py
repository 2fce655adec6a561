"""A report, or several, as one interactive HTML file, which loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from hf_cod.functional.bits import SCALE_BITS
from hf_cod.io.reading import read_text
from hf_cod.io.report import RunReport
from hf_cod.io.report_columns import MEANINGS
from hf_cod.io.report_results import check_results
from hf_cod.scoring.settings import DEFAULT_SPREAD

PLACE = Path(__file__).parent
SCRIPTS = ("allocation.js", "chart.js", "runs.js", "page.js")
# Measures by which the page distributes a budget, the first one that a report has by default: high values mean that the
# layer matters.
IMPORTANCE = ("score", "angular_distance", "block_influence", "layer_drop", "gradient_norm")
# At the start of each page; how a page is recognised as ours.
MARK = '<meta name="generator" content="hf_cod report">'
# Characters that could end the element of the data, or that earlier JavaScript takes as the end of a line.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page_of(reports: Sequence[RunReport], labels: Sequence[str], summary: Sequence[str]) -> str:
    """Reports as one page: bars by layer, angular distances, and a budget that is distributed over the layers.

    Bars and heat maps of several reports are linked by relative depth.

    Args:
        reports: the reports, of any command; what a report has not measured is left out.
        labels: one name per report.
        summary: sentences at the top of the page.

    Raises:
        ValueError: results that are not as `diagnose` writes them.
    """
    for report in reports:
        check_results(report)
    script = "".join(read_text(PLACE / name, "page") for name in SCRIPTS)
    style = read_text(PLACE / "report.css", "page")
    names = dict.fromkeys(name for report in reports for name in report.layers)
    data = {
        "runs": [_run(report, label) for report, label in zip(reports, labels, strict=True)],
        "summary": list(summary),
        "measures": {name: MEANINGS[name] for name in names if name in MEANINGS},
        "importance": IMPORTANCE,
        "spread": DEFAULT_SPREAD,
        "scale_bits": SCALE_BITS,
    }
    frame = Template(read_text(PLACE / "report.html", "page"))
    return frame.substitute(
        title=escape(" / ".join(dict.fromkeys(report.kind for report in reports)) + ": " + " / ".join(labels)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=json.dumps(data, allow_nan=False).translate(_ESCAPES),
    )


def check_page(path: str | Path) -> None:
    """Checks that a file is a page of this module, before it is replaced.

    Raises:
        ValueError: it is another file.
    """
    if MARK not in read_text(path, "report"):
        raise ValueError(f"report: expected a page of hf_cod, got {str(path)!r}")


def _run(report: RunReport, label: str) -> dict[str, Any]:
    dtype = getattr(torch, report.environment.get("dtype", ""), None)
    bits = 8 * dtype.itemsize if isinstance(dtype, torch.dtype) else None
    return {"label": label, "report": report.to_json(), "stored_bits": bits}


def _hash(text: str) -> str:
    """The hash by which the page's policy allows this text, and no other, as its script or style."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
