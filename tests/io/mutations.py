"""Files of ours that somebody changed: each record's own schema says where, and what must be refused."""

from __future__ import annotations

import copy
import json
import types
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from hf_cod import (
    DepthPlan,
    ExpertPlan,
    ExpertScores,
    FitPlan,
    LayerAllocation,
    LayerScores,
    RankPlan,
    WidthPlan,
)

MEASURED = {"loss": 4.1, "expected": 4.0, "left": 0.7, "steps": {"rank": 0.3}}
RECORDS = {
    "scores": LayerScores("m", "owl", [0.5, 0.25, 1.0], [10, 20, 30], {"threshold": 3.0, "spread": 0.1}),
    "expert_scores": ExpertScores(
        "m", "owl", {"a": [0.5, 1.0], "b": [0.25]}, {"a": 0, "b": 2}, {"a": [3, 0], "b": [3]}, {"a": [9, 9], "b": [9]}
    ),
    "allocation": LayerAllocation("sparsity", 0.5, [0.5, 0.25], [10, 20], "owl", 8, "m", [10, 20]),
    "depth_plan": DepthPlan(
        "m",
        "search",
        [1],
        [10, 20, 30],
        [0.5, None, 0.25],
        [2],
        {"greedy": {"layers": [1], "loss": 1.5, "maps": 0}},
        "given",
    ),
    "expert_plan": ExpertPlan(
        "m", "owl", {"a": [1], "b": [0]}, {"a": 0, "b": 2}, 2, [9, 0, 9], {"a": [1.0, 0.5], "b": [0.1, 0.3]}, {}, {}
    ),
    "fit_plan": FitPlan(
        "bits",
        5.0,
        {"rank": 0.3},
        4.1,
        4.0,
        {"bytes": 100, "layer_bytes": 80, "layer_weights": 90},
        {"rank": {"levels": [0.3], "losses": [4.1], "left": [0.7]}},
        [MEASURED],
        [[0.9, 4.1, {"rank": 0.3}]],
        ["note"],
    ),
    "width_plan": WidthPlan(0.7, [2, None], [16, 32], "given", "m", [10, 20], [8, None]),
    "rank_plan": RankPlan("parameter_share", 0.7, {"model.layers.0.mlp.up_proj": 3}, "fisher", {}, "m", [10, 20]),
}


class Raw(str):
    """JSON as it stands, valid or not."""


def content_of(record: Any, folder: Any) -> dict[str, Any]:
    """What a record's file holds."""
    content: dict[str, Any] = json.loads(record.save(folder / "whole.json").read_text())
    return content


def text_of(value: Any) -> str:
    """JSON in which `Raw` parts stand as they are, and a list of pairs called "twice" is a dict."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {text_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)


def places_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value inside of one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*at, key), *places_of(item, (*at, key)))]


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there; None of a place means: without it."""
    changed = copy.deepcopy(content)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    if value is Ellipsis:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return changed


HOSTILE = [
    *(True, False, None, "3", "", "inf", -1, -0.5, 0, 7, 10**18, 0.5, [], {}, [[]], {"a": [1]}, "../../x", "/etc/x"),
    *("\x1b[31m", "[/red]", "a\x00b", "\u202e"),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0", '"\\ud800"', "[" * 3000, "{")),
]


@st.composite
def mutated(draw: Any, content: Any, damaged: bool = True) -> bytes:
    """The bytes of a file in which one to three things are changed; its form is, too, if it may be `damaged`."""
    for _ in range(draw(st.integers(1, 3))):
        places = places_of(content)
        if not places:
            break
        place = draw(st.sampled_from(places))
        content = put(content, place, draw(st.sampled_from([Ellipsis, *HOSTILE])))
    if not damaged:
        return text_of(content).encode()
    if draw(st.booleans()) and isinstance(content, dict):
        content = {**content, draw(st.sampled_from(["extra", "", "..", "format "])): 1}
    raw = text_of(content).encode()
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flipped", "twice", "latin"]))
    if kind == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    if kind == "flipped" and raw:
        place = draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + bytes([draw(st.integers(0, 255))]) + raw[place + 1 :]
    if kind == "twice":
        raw = raw.replace(b"{", b'{"format": 1, ', 1)
    return b"\xff" + raw if kind == "latin" else raw


def forbidden(kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Name -> content that a record's schema forbids, made of content that it allows, field by field."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {
        "another format": {**content, "format": 2},
        "format as text": {**content, "format": "1"},
        "format true": {**content, "format": True},
        "no format": put(content, ("format",), Ellipsis),
        "unknown entry": {**content, "extra": 1},
        "a list": [content],
    }
    for entry in fields(kind):
        name, whole = entry.name, content[entry.name]
        if entry.default is MISSING and entry.default_factory is MISSING:
            found[f"no {name}"] = put(content, (name,), Ellipsis)
        for place, annotation in _numbers(whole, hints[name], (name,)):
            for word, value in _WRONG[annotation].items():
                found[f"{word} in {place}"] = put(content, place, value)
            if annotation in (int, float) and "least" in entry.metadata:
                found[f"less than the least in {place}"] = put(content, place, entry.metadata["least"] - 1)
            if annotation in (int, float) and "most" in entry.metadata:
                found[f"more than the most in {place}"] = put(content, place, entry.metadata["most"] + 1)
            if "choices" in entry.metadata and annotation is str:
                found[f"no choice in {place}"] = put(content, place, "none of them")
        if "one_for_each" in entry.metadata:
            found[f"too many {name}"] = put(content, (name,), [*whole, whole[0]])
            found[f"too few {name}"] = put(content, (name,), whole[:-1])
        if isinstance(whole, dict) and whole:
            key = next(iter(whole))
            if hints[name] != dict[str, Any]:
                found[f"a path in {name}"] = put(content, (name,), {"../x": whole[key]})
    return found


_NO_NUMBER = {
    "true": True,
    "a numeric string": "1",
    "NaN": Raw("NaN"),
    "infinity": Raw("1e999"),
    "a list": [1],
    "names": {"a": 1},
    "endless digits": Raw("9" * 5000),
}
_WRONG: dict[Any, dict[str, Any]] = {
    int: {**_NO_NUMBER, "a fraction": 1.5},
    float: _NO_NUMBER,
    str: {"a number": 1, "null": None, "a list": ["a"], "half a pair": Raw('"\\ud800"')},
}


def _numbers(value: Any, annotation: Any, at: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any]]:
    """The places of plain values that the annotation tells the type of."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(option for option in get_args(annotation) if option is not type(None))
        if value is None:
            return []
    if annotation in _WRONG:
        return [(at, annotation)]
    if get_origin(annotation) is list and value:
        return _numbers(value[0], get_args(annotation)[0], (*at, 0))
    if get_origin(annotation) is dict and value:
        key = next(iter(value))
        return _numbers(value[key], get_args(annotation)[1], (*at, key))
    return []
