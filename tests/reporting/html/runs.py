"""Reports of diagnoses of any depth, with what a real one has."""

from __future__ import annotations

import math
import random

from hf_cod import RunReport

HOSTILE = "</script><script>document.title = 'taken'</script><b>&amp;\u2028 \"$title\" 'x'"


def diagnosed(layers: int, model: str = "tiny", /, **changes) -> RunReport:
    """A report of `diagnose` for a model of that many layers."""
    draw = random.Random(layers)
    row = [draw.uniform(0.02, 0.1) for _ in range(layers)]
    angles = [[row[i] + 0.01 * n if i + n < layers else None for n in range(layers)] for i in range(layers)]
    without = [1e6, *(draw.uniform(21, 25) for _ in range(layers - 1))]
    values = {
        "kind": "diagnose",
        "model": model,
        "settings": {"seed": 0, "text": "/home/me/texts/novel.txt"},
        "environment": {"torch": "2", "dtype": "bfloat16"},
        "layers": {
            "angular_distance": row,
            "variance": [2.0**i for i in range(layers)],
            "gradient_norm": [None, math.inf, *(1.0 for _ in range(layers - 2))],
            "layer_drop": [value - 20 for value in without],
        },
        "results": {
            "angular_distance": angles,
            "effective_depth": {"value": 1.4, "low": None, "high": None, "confidence": 0.95},
            "layer_drop": {"metric": "perplexity", "lower_is_better": True, "intact": 20.0, "without": without},
            "layer_parameters": [1_000_000 + 50_000 * i for i in range(layers)],
            "intervals": {"angular_distance": [[0.9 * value, 1.1 * value] for value in row]},
        },
        "summary": ["Effective depth 1.4."],
        "notes": ["something was left out"],
    }
    return RunReport(**{**values, **changes})
