"""Which layers are dead or explode, told from a training history alone.

Thresholds are far from anything that a sound training shows; what is told is worth a look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from hf_cod.io.report import format_number

# A layer is dead that turns the hidden state by less than this part of a half-turn, ...
DEAD_ANGLE = 1e-3
# ... or whose gradient norm is less than this part of the median layer's, ...
DEAD_GRADIENT = 1e-3
# ... in so many measurements in a row: a layer may start at zero.
DEAD_FOR = 3
# A layer explodes whose output variance is more than so many times the largest of its earlier measurements (during
# the warm-up of a sound training it may grow twentyfold from one measurement to the next), ...
EXPLOSION = 100.0
# ... of which there must be so many: the first is of a model that has learnt nothing.
EARLIER = 3


def find_trouble(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """What is wrong at the last of the measured steps, in words.

    Args:
        lines: of a `TrainingHistory`.

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
