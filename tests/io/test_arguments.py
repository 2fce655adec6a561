"""The front door: every public function checks names and kinds of its arguments, and shows them to an editor."""

import inspect
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Unpack, get_args, get_origin, get_type_hints

import pytest
from mypy import api

import hf_cod

# Names that take no arguments of a user: records that functions return, an error, a module of a packed model.
RETURNED = {
    "BitPlan",
    "Comparison",
    "DecoderLayers",
    "DepthPlan",
    "FitPlan",
    "LayerStatistics",
    "MeasurementError",
    "RankPlan",
    "RunReport",
    "SparseLinear",
    "WidthPlan",
}
# In models/, which imports nothing of the other rooms; their fields are those of a transformers configuration.
OF_MODELS = {"fold_lns", "from_authors", "llama_preset", "to_lns"}
CALLED = sorted(set(hf_cod._HOMES) - RETURNED - OF_MODELS)


def written(thing):
    """The function as it is written, below its decorators."""
    return inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing)


def with_fields():
    """(name, function, TypedDict, dataclass) of each function that takes fields by name."""
    for name in CALLED:
        function = written(getattr(hf_cod, name))
        hints = get_type_hints(function) if not is_dataclass(getattr(hf_cod, name)) else {}
        opened = [get_args(hint)[0] for hint in hints.values() if get_origin(hint) is Unpack]
        if opened:
            holder = next(hints[key] for key in ("settings", "config", "how") if key in hints)
            (kind,) = set(get_args(holder)) - {NoneType}
            yield pytest.param(name, function, opened[0], kind, id=name)


@pytest.mark.parametrize("name", CALLED)
def test_an_unknown_name_fails_at_the_call(name):
    thing = getattr(hf_cod, name)
    last = [p for p in inspect.signature(thing).parameters if len(p) > 3][-1]
    misspelt = last[:-2] + last[-1]
    with pytest.raises(ValueError, match=rf"^{name}: expected one of .*, got '{misspelt}'; did you mean "):
        thing(**{misspelt: None})


@pytest.mark.parametrize("name, function, typed, kind", with_fields())
def test_fields_by_name_are_those_of_the_settings(name, function, typed, kind):
    own = {p for p in inspect.signature(function, follow_wrapped=False).parameters}
    hints = get_type_hints(kind)
    expected = {f.name: hints[f.name] for f in fields(kind) if f.init and f.name not in own}
    assert get_type_hints(typed) == expected
    shown = inspect.signature(getattr(hf_cod, name)).parameters
    assert set(expected) <= set(shown) and not any(p.kind is p.VAR_KEYWORD for p in shown.values())


def test_every_function_with_options_is_among_them():
    assert {"prune", "diagnose", "owlore", "LayerMonitor", "quantize"} <= {p.values[0] for p in with_fields()}
    for name in CALLED:
        rest = [
            p for p in inspect.signature(written(getattr(hf_cod, name))).parameters.values() if p.kind is p.VAR_KEYWORD
        ]
        assert not rest or name in {p.values[0] for p in with_fields()}, name


def test_a_type_checker_sees_a_misspelt_name_and_a_wrong_kind(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(
        "from hf_cod import owlore, score_layers\n"
        "from torch import nn\n\n"
        "def use(model: nn.Module) -> None:\n"
        "    owlore(n_active=5)\n"
        "    owlore(n_actve=5)\n"
        "    owlore(n_active='five')\n"
        "    score_layers(model, treshold=7.0)\n"
    )
    told, _, _ = api.run([str(file), "--no-error-summary", "--follow-imports=silent", "--ignore-missing-imports"])
    lines = [line.split(":", 2)[1] for line in told.splitlines() if ": error:" in line]
    assert lines == ["6", "7", "8"], told
