"""The front door: every public function checks names and kinds of its arguments, and shows them to an editor."""

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Unpack, get_args, get_origin, get_type_hints

import pytest
import torch
from mypy import api
from torch import nn

import hf_cod
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

# Names that take no arguments of a user: records that functions return, an error, a module of a packed model.
RETURNED = {
    "BitPlan",
    "Comparison",
    "DecoderLayers",
    "DepthPlan",
    "ExpertPlan",
    "FitPlan",
    "LayerStatistics",
    "MeasurementError",
    "RankPlan",
    "RepeatPlan",
    "RunReport",
    "SparseLinear",
    "WidthPlan",
}
# In models/, which imports nothing of the other rooms; their fields are those of a transformers configuration.
OF_MODELS = {"fold_lns", "from_authors", "llama_preset", "to_gpas", "to_layer_scale", "to_lns"}
CALLED = sorted(set(hf_cod._HOMES) - RETURNED - OF_MODELS)

# What fits arguments that a call needs.
RIGHT = {
    "donor": build("llama"),
    "model": build("llama"),
    "student": nn.Linear(1, 1),
    "teacher": nn.Linear(1, 1),
    "tokenizer": gpt_like(),
    "batches": [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}],
    "calibration": [],
    "tuning": [],
    "texts": "text",
    "tasks": [],
    "data": "text",
    "plan": 1,
    "steps": {},
    "budget": 0.5,
    "kind": "bits",
    "make": dict,
    "n_removed": 1,
    "share": 0.5,
    "bits": 3.5,
    "parameter_share": 0.5,
    "layers": 1,
    "start": 0,
    "end": 1,
    "first": 1,
    "reports": [],
    "norm_type": "lns",
    "size": "130M",
    "source": "no/such-model",
    "header": {},
    "scores": hf_cod.LayerScores("", "owl", [1.0], [1]),
    "output": "made",
}


def written(thing):
    """The function as it is written, below its decorators."""
    return inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing)


def with_fields():
    """(name, function, TypedDict, dataclasses) of each function that takes fields by name."""
    for name in CALLED:
        function = written(getattr(hf_cod, name))
        hints = get_type_hints(function) if not is_dataclass(getattr(hf_cod, name)) else {}
        opened = [get_args(hint)[0] for hint in hints.values() if get_origin(hint) is Unpack]
        if opened:
            holders = [hints[key] for key in ("settings", "config", "how", "samples") if key in hints]
            kinds = [kind for holder in holders for kind in get_args(holder) if kind is not NoneType]
            yield pytest.param(name, function, opened[0], kinds, id=name)


@pytest.mark.parametrize("name", CALLED)
def test_an_unknown_name_fails_at_the_call(name):
    thing = getattr(hf_cod, name)
    last = [p for p in inspect.signature(thing).parameters if len(p) > 3][-1]
    misspelt = last[:-2] + last[-1]
    with pytest.raises(ValueError, match=rf"^{name}: did you mean .*\? expected one of .*, got '{misspelt}'$"):
        thing(**{misspelt: None})


# Argument -> what people give instead, and what they are told.
MISTAKES = {
    "model": ("gpt2", r"expected a loaded (transformers )?model.*, got 'gpt2'; load it by from_pretrained"),
    "student": ("gpt2", "expected a loaded model, got 'gpt2'; load it by from_pretrained"),
    "teacher": (Path("gpt2"), r"expected a loaded model, got PosixPath\('gpt2'\); load it by from_pretrained"),
    "tokenizer": (nn.Linear(1, 1), "expected a transformers tokenizer, got Linear; AutoTokenizer.from_pretrained"),
    "texts": (3, "expected strings, got int; read the file"),
    "batches": ("a text", r"expected (dicts of tensors for the model's forward|a list of dicts of tensors), got "),
    "statistics": ("statistics.safetensors", "expected LayerStatistics or None, got 'statistics.safetensors'"),
    "settings": ({"seed": 1}, r"expected \w+Settings or None, got dict"),
    "samples": ({"seed": 1}, "expected SampleSettings or None, got dict"),
    "config": (3.5, "expected OwlBnbConfig or None, got 3.5"),
    "journal": (7, "expected a path or None, got 7"),
    "output": (7, "expected a path( or None)?, got 7"),
    "output_dir": (7, "expected a path or None, got 7"),
    "history": (7, "expected a path or None, got 7"),
    "layers_path": (3, "expected a string or None, got 3"),
    "name": (3, "expected a string or None, got 3"),
    "show_progress": ("yes", "expected True or False, got 'yes'"),
    "seed": ("zero", "expected an integer.*, got 'zero'"),
    "budget": ("16G", "expected a number.*, got '16G'"),
    "sequence_length": ("256", "expected an integer, got '256'"),
    "lr": ("1e-3", "expected a number.*, got '1e-3'"),
}
# Names that mean something else there: a file is as good as what it holds; records name their model and settings.
OTHERWISE = {
    ("OwlBnbConfig", "statistics"),
    ("quantize", "statistics"),
    ("ExpertScores", "model"),
    ("ExpertScores", "settings"),
    ("LayerScores", "model"),
    ("LayerScores", "settings"),
    ("LayerAllocation", "model"),
    ("GenerationTask", "name"),
}


def wrong_calls():
    for name in CALLED:
        for argument in inspect.signature(getattr(hf_cod, name)).parameters:
            if argument in MISTAKES and (name, argument) not in OTHERWISE:
                yield pytest.param(name, argument, *MISTAKES[argument], id=f"{name}-{argument}")


@pytest.mark.parametrize("name, argument, value, message", wrong_calls())
def test_a_value_of_another_kind_fails_at_the_call(name, argument, value, message):
    thing = getattr(hf_cod, name)
    needed = [p.name for p in inspect.signature(thing).parameters.values() if p.default is p.empty]
    # What else is needed is None where it is looked at later than the mistake.
    given = {p: RIGHT.get(p) for p in needed if p != argument}
    with pytest.raises(ValueError, match=f"^{argument}: {message}"):
        thing(**{**given, argument: value})


class Odd:
    """What no argument is."""


ODD = [Odd(), "x", 3, 2.5, -1, float("nan"), None, [Odd()], {"a": Odd()}, Path()]
# Arguments of transformers and PEFT, which check their own; a probe is read when the training starts.
NOT_OURS = {("OwLoreConfig", "task_type"), ("OwlBnbConfig", "quant_method"), ("SparseConfig", "quant_method")}
NOT_OURS |= {("LayerDiagnosticsCallback", "probe")}


@pytest.mark.parametrize("name", sorted({*CALLED, *OF_MODELS}))
def test_no_value_brings_an_error_of_python_or_of_the_system(name, tmp_path, monkeypatch):
    """Each argument in turn is each of `ODD`: a call works, or says which argument it expected to be what."""
    monkeypatch.chdir(tmp_path)
    thing = getattr(hf_cod, name)
    parameters = inspect.signature(thing).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for argument in {p.name for p in parameters if (name, p.name) not in NOT_OURS}:
        for value in ODD:
            given = {p: RIGHT.get(p) for p in needed} | {argument: value}
            try:
                thing(**given)
            except (ValueError, TypeError, ImportError) as error:
                assert re.match(r"[\w .'\[\]]+: expected .*, got ", str(error), re.DOTALL), (argument, value, error)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hf_cod.compare([1, "x"]), "reports: expected a list of RunReports, got a list of int"),
        (lambda: hf_cod.compare("run"), "reports: expected a list of RunReports, got 'run'"),
        (lambda: hf_cod.owlore(betas=(0.9, "x")), "betas: expected a list of numbers or None, got a tuple of float"),
        (lambda: hf_cod.owlore(betas=(0.9,)), "betas: expected a list of numbers or None, got a tuple of float"),
        (lambda: hf_cod.RunReport.load(3), "path: expected a path, got 3"),
        (lambda: hf_cod.LayerScores.load(None), "path: expected a path, got None"),
        (lambda: hf_cod.LayerStatistics.load(3), "path: expected a path, got 3"),
        (lambda: hf_cod.LayerStatistics.merge(["a.safetensors"]), "parts: expected a list of LayerStatistics"),
        (lambda: hf_cod.TrainingHistory.load(3), "path: expected a path, got 3"),
        (lambda: RIGHT["scores"].save(3), "path: expected a path, got 3"),
        (lambda: RIGHT["scores"].save("."), "path: expected a file, got the directory '.'"),
        (lambda: hf_cod.RunReport("diagnose", "", {}, {}, {}, {}).plot(3), "directory: expected a path or None, got 3"),
        (
            lambda: hf_cod.collect_statistics(build("llama"), None),
            "batches: expected batches, or tokenizer and texts, got",
        ),
        (lambda: hf_cod.apply_steps(build("llama"), {}), "batches: expected batches, or tokenizer and texts, got"),
        (lambda: hf_cod.fold_lns("x", 3), "output: expected a path or None, got 3"),
    ],
)
def test_wrong_kinds_of_what_records_and_lists_hold(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_a_directory_is_no_file_and_no_error_of_the_system_comes_through(tmp_path):
    with pytest.raises(ValueError, match="history: expected a file, got the directory"):
        hf_cod.TrainingHistory({}, tmp_path)
    for thing in (hf_cod.TrainingHistory, hf_cod.LayerScores, hf_cod.LayerAllocation, hf_cod.RankPlan):
        for path in (tmp_path, tmp_path / "none.json"):
            with pytest.raises(ValueError, match=r"^[\w ]+: expected .*, got .*'") as raised:
                thing.load(path)
            assert "Errno" not in str(raised.value)


@pytest.mark.parametrize("name, function, typed, kinds", with_fields())
def test_fields_by_name_are_those_of_the_settings(name, function, typed, kinds):
    own = {p for p in inspect.signature(function, follow_wrapped=False).parameters}
    expected = {
        f.name: get_type_hints(kind)[f.name] for kind in kinds for f in fields(kind) if f.init and f.name not in own
    }
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


@pytest.mark.slow
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
