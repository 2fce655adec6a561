"""Regular expressions for names of matrices, in the configs of engines that choose modules by them."""

from __future__ import annotations

import re
from collections import Counter

from hf_cod.compression.export.plan import ExportPlan

_LAYER = re.compile(r"\.(\d+)\.")


def expressions(names: list[str]) -> list[str]:
    """Regular expressions for whole names, one for matrices of the same name in several layers."""
    places: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.search(name)
        parts = [] if found is None else [re.escape(part) for part in (name[: found.start()], name[found.end() :])]
        place = r"\.({})\.".join(parts) or "{}"
        places.setdefault(place, []).append(name if found is None else found[1])
    return [f"^{place.replace('{}', '|'.join(map(re.escape, of)))}$" for place, of in places.items()]


def most_common(plan: ExportPlan) -> int:
    """The width of most weights; of equally many the smaller one."""
    counted: Counter[int] = Counter()
    for name, width in plan.widths.items():
        counted[width] += plan.sizes[name][0] * plan.sizes[name][1]
    return max(counted, key=lambda width: (counted[width], -width))
