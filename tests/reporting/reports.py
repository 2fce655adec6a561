"""A small report of a diagnosis."""

from __future__ import annotations

import math

from hf_cod import RunReport


def report(**changes) -> RunReport:
    values = {
        "kind": "diagnose",
        "model": "tiny",
        "settings": {"seed": 0},
        "environment": {"torch": "2"},
        "layers": {
            "angular_distance": [0.4, 0.1],
            "layer_drop": [5.0, math.inf],
            "gradient_norm": [1.0, 3.0],
            "variance": [1.0, 900.0],
        },
        "results": {
            "angular_distance": [[0.4, 0.5], [0.1, None]],
            "effective_depth": {"value": 1.4, "low": 1.3, "high": 1.5, "confidence": 0.95},
            "late_share": 0.2,
            "layer_drop": {"metric": "perplexity", "lower_is_better": True, "intact": 10.0, "without": [15.0, 1e6]},
        },
        "summary": ["Effective depth 1.4 of 2 layers."],
        "notes": ["something was left out"],
    }
    return RunReport(**{**values, **changes})
