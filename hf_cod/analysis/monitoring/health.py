"""Detects dead and exploding layers in a training history.

The thresholds are far from the values of a healthy training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from hf_cod.io.report import format_number

# A layer is dead if it turns the hidden state by at most this angular distance (a share of a half-turn), ...
DEAD_ANGLE = 1e-3
# ... or if its gradient norm is at most this share of the median layer's, ...
DEAD_GRADIENT = 1e-3
# ... in this number of consecutive measurements, since a layer may start at zero.
DEAD_FOR = 3
# A layer explodes if its output variance exceeds this multiple of the largest earlier measurement (in the warm-up of a
# healthy training it may grow twentyfold from one measurement to the next), ...
EXPLOSION = 100.0
# ... and there are at least this number of earlier measurements; the first is that of an untrained model.
EARLIER = 3


def find_trouble(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """The trouble at the last measured step, in sentences.

    Args:
        lines: lines of a `TrainingHistory`.

    Returns:
        (kind, layer) -> a sentence. Kinds: "angle", "gradient", "variance", and "failure" (layer -1).
    """
    if not lines:
        return {}
    last = lines[-1]
    found = {}
    if last.get("failure"):
        found["failure", -1] = f"step {last['step']}: {last['failure']}"
    for kind, layer, what in (*_dead(lines[-DEAD_FOR:]), *_exploding(lines)):
        found[kind, layer] = f"step {last['step']}: layer {layer} {what}"
    return found


def _dead(recent: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, str]]:
    if len(recent) < DEAD_FOR:
        return
    tests = {
        "angle": ("angular_distance", lambda line: DEAD_ANGLE, "seems dead: it turns the hidden state by"),
        "gradient": ("gradient_norm", _least_gradient, "seems dead: its gradient norm is"),
    }
    for kind, (measure, threshold, words) in tests.items():
        rows = [line.get(measure) or [] for line in recent]
        for layer in range(min(map(len, rows))):
            values = [row[layer] for row in rows]
            if all(v is not None and v <= threshold(line) for v, line in zip(values, recent, strict=True)):
                yield kind, layer, f"{words} {format_number(values[-1])}"


def _least_gradient(line: dict[str, Any]) -> float:
    known = [value for value in line["gradient_norm"] if value is not None]
    return DEAD_GRADIENT * median(known) if known else -math.inf


def _exploding(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, str]]:
    for layer, value in enumerate(lines[-1].get("variance") or []):
        rows = [line["variance"] for line in lines[:-1] if line.get("variance")]
        before = [row[layer] for row in rows if row[layer] is not None]
        if value is not None and len(before) >= EARLIER and value > EXPLOSION * max(before):
            most = format_number(max(before))
            yield "variance", layer, f"explodes: its output variance is {format_number(value)}, at most {most} before"
