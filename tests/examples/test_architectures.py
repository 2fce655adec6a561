"""The sweep of architectures: a fixed part of its kinds here, all of them behind the marker `slow`."""

import contextlib
import dataclasses
import importlib
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_cod import find_decoder_layers

FOLDER = Path(__file__).parents[2] / "examples"
_EXCLUDED = dict.fromkeys(["prune", "sparsegpt", "quantize", "compensated", "factorize", "whitened"], "excluded")
# Kind -> the results of its checks that are not "works".
PART = {
    "llama": {},
    "mamba": {**_EXCLUDED, "narrow": "refused"},
    "mixtral": {name: result for name, result in _EXCLUDED.items() if name not in ("factorize", "whitened")},
    "seq2seq/t5": {**_EXCLUDED, "narrow": "excluded", "repeat": "excluded"},
    "encoder/bert": {},
    "vision/vit": {},
    "vision-language/clip@vision": {},
    "vision-language/llava+images": {},
}
NAMED = {
    "seq2seq/": ["t5", "bart", "whisper", "marian"],
    "encoder/": ["bert", "modernbert", "albert", "deberta", "deberta-v2"],
    "vision/": ["vit", "dinov2", "dinov3_vit", "swin"],
    "vision-language/": ["clip@text", "clip@vision", "gemma3", "llava", "paligemma", "qwen2_5_vl+images"],
}


@pytest.fixture(scope="module")
def load():
    """The modules of the sweep, by name; its server ends with the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
        importlib.import_module("architecture_reload").stop_server()
    for name in [name for name, m in sys.modules.items() if str(FOLDER) in str(getattr(m, "__file__", None))]:
        if "." not in name:
            del sys.modules[name]


def results_of(load, kind):
    sweep, case = load("architectures"), load("tiny_architectures").Case(kind)
    assert sweep.built(case)["why"] is None
    return {check: sweep.tried(case, check) for check in load("architecture_checks").checks_of(case)}


@pytest.mark.process
@pytest.mark.parametrize("kind", PART)
def test_a_part_of_the_sweep(load, kind):
    found = results_of(load, kind)
    assert {check: entry["result"] for check, entry in found.items() if entry["result"] != "works"} == PART[kind], found


@pytest.mark.slow
def test_the_sweep_finds_nothing_wrong(load, tmp_path):
    sweep = load("architectures")
    results = sweep.sweep(load("architecture_kinds").kinds(), tmp_path)
    wrong = {
        (kind, check): entry["why"]
        for kind, found in results.items()
        for check, entry in found.items()
        if entry.get("result") == "wrong"
    }
    assert not wrong
    assert (tmp_path / "architectures.md").read_text().startswith("# Architectures")


def test_the_kinds_are_those_of_transformers(load):
    found = load("architecture_kinds").kinds()
    named = {group + kind for group, kinds in NAMED.items() for kind in kinds}
    assert named | {*PART} <= {*found} and len(found) == len({*found}) > 600


def _moved(function):
    """A function of the package that also moves a weight of the model."""

    def moved(model, *args, **options):
        result = function(model, *args, **options)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "layers.2." in name and p.dim() == 2).mul_(1.5)
        return result

    return moved


def _reported(function, part, added=(), **values):
    """A function of the package whose report has other values, or more notes."""

    def changed(*args, **options):
        report = function(*args, **options)
        before = getattr(report, part)
        return dataclasses.replace(report, **{part: [*before, *added] if added else {**before, **values}})

    return changed


def _refusing(function):
    """A function of the package that moves a weight and then refuses the model."""

    def refusing(model, *args, **options):
        _moved(lambda model: None)(model)
        raise ValueError("model: expected another one, got this one")

    return refusing


def _with(function, **changed):
    """A function of the package with other arguments."""
    return lambda *args, **options: function(*args, **{**options, **changed})


def _scaling(function, factor=1.1):
    """`score_layers` with other scores."""

    def scaled(*args, **options):
        scores = function(*args, **options)
        return dataclasses.replace(scores, values=[factor * value for value in scores.values])

    return scaled


def _other_experts(function):
    """`drop_experts`, which removes others than those that are named."""

    def other(model, plan, **options):
        if not isinstance(plan, float):
            plan = {name: [(expert + 1) % 4 for expert in experts] for name, experts in plan.items()}
        return function(model, plan, **options)

    return other


SABOTAGES = {
    "angles": ("diagnose", "diagnose", partial(_reported, part="layers", angular_distance=[0.3] * 4), "angle of layer"),
    "diagnosis moves a weight": ("diagnose", "diagnose", _moved, "has changed"),
    "zeros": ("prune", "prune", lambda prune: lambda model, share, *args, **o: prune(model, 0.4, *args, **o), "are 0"),
    "sparsity": ("prune", "prune", partial(_reported, part="results", sparsity=0.49), "the report differs"),
    "counts": ("prune", "prune", partial(_reported, part="layers", parameters=[1] * 4), "counts other weights"),
    "skip": ("drop", "skip", lambda skip: lambda *args: contextlib.nullcontext(), "skip against a layer that returns"),
    "drop": ("drop", "drop", lambda drop: lambda m, layer, *o: drop(m, (layer + 1) % 4, *o), "skip against drop"),
    "excluded": ("quantize", "quantize", partial(_reported, part="results", module_bits={}), "0 weights quantized"),
    "factors": ("factorize", "factorize", _moved, "the model of this rank"),
    "narrower": ("narrow", "narrow", _moved, "other rows|with zeros"),
    "two layers": ("owlore", "OwLoreAdamW", lambda made: lambda m, n_active, **o: made(m, n_active=2, **o), "instead"),
    "zeros of sparsegpt": (
        "sparsegpt",
        "prune",
        lambda f: lambda model, s, *args, **o: f(model, 0.4, *args, **o),
        "are 0",
    ),
    "counted": (
        "prune",
        "prune",
        partial(_reported, part="notes", added=["9 weights of the layers are not pruned, because"]),
        "notes exclude 9",
    ),
    "lost energy": ("compensated", "quantize", partial(_reported, part="layers", error=[float("nan")] * 4), "are lost"),
    "whitened factors": ("whitened", "factorize", _moved, "the model of this rank"),
    "scores": ("score", "score_layers", lambda f: _scaling(f), "weight_norm of layer 0|angular of layer 0"),
    "equal scores": ("score", "score_layers", lambda f: _scaling(f, 0), "owl is equal in all layers"),
    "packed": ("pack", "pack_sparse", lambda f: lambda m: _moved(id)(m) and f(m), "the packed model differs"),
    "nothing packed": ("pack", "pack_sparse", lambda f: lambda model: model, "no matrix is packed"),
    "another layer twice": ("repeat", "repeat", lambda f: lambda m, a, b, **o: f(m, a + 1, b + 1, **o), "the repeated"),
    "other experts": ("drop-experts", "drop_experts", lambda f: _other_experts(f), "the model without the experts"),
    "a refusal after a change": ("prune", "prune", lambda f: _refusing(f), "has changed after the refusal"),
    "one adapter": (
        "adapter",
        "OwLoreAdamW",
        lambda made: lambda m, n_active, **o: made(m, n_active=1, **o),
        "instead",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_each_check_can_fail(load, monkeypatch, sabotage):
    check, name, change, message = SABOTAGES[sabotage]
    place = {"drop": "architecture_drop", "owlore": "architecture_training", "adapter": "architecture_training"}
    place |= {"score": "architecture_scores"} | dict.fromkeys(
        ["pack", "repeat", "drop-experts"], "architecture_structure"
    )
    checks = load(place.get(check, "architecture_checks"))
    monkeypatch.setattr(checks, name, change(getattr(checks, name)))
    found = load("architectures").tried(
        load("tiny_architectures").Case("mixtral" if check == "drop-experts" else "llama"), check
    )
    assert found["result"] == "wrong"
    assert re.search(message, found["why"])


@pytest.mark.process
def test_a_reload_that_differs_or_fails_is_told(load):
    references, reload, case = (
        load("architecture_comparison"),
        load("architecture_reload"),
        load("tiny_architectures").Case("llama"),
    )
    model = case.build()
    references.check_reload(case, model)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)  # which is not saved
    with pytest.raises(references.WrongResult, match="reload differs by"):
        references.check_reload(case, model)
    batch = {"input_ids": torch.full((1, 3), 1_000)}  # no such tokens
    with pytest.raises(reload.ReloadError, match="IndexError"):
        reload.reloaded_outputs(model, case.auto_class, batch, references.outputs)


def test_the_page_counts_and_groups(load):
    page = load("architecture_tables").page
    built = {"built": {"why": None, "experts": False}}
    refused = {"result": "refused", "why": "model: expected 4 layers in LlamaForCausalLM, got 0"}
    other = {"result": "refused", "why": "model: expected 6 layers in GPT2LMHeadModel, got 0"}
    results = {
        "llama": built | {"drop": refused},
        "gpt2": built | {"drop": other},
        "mixtral": {"built": {"why": None, "experts": True}, "drop": {"result": "works", "why": ""}},
        "encoder/bert": {"built": {"why": "ImportError: no timm", "experts": False}},
        "vision/vit": built | {"drop": {"result": "works", "why": ""}},
    }
    text = page(results, {"transformers": "5.24"})
    assert "3 of 3 kinds are built; 1 of them has banks of experts" in text
    assert "| drop | 1 | 0 | 2 | 0 | 0 | 33.3% | 0.0% | 95% | 82.9% |" in text
    assert "got 0 | drop | `llama`, `gpt2` |" in text and "| ImportError: no timm | `encoder/bert` |" in text
    assert "transformers 5.24" in text and "| whitened | 0 | 0 | 0 | 0 | 0 | - | - | 97% | - |" in text
    assert "are for causal models" in text and "| drop | 1 | 0 | 0 | 0 | 0 | 100.0% | 100.0% |\n" in text


def test_layers_that_are_refused_are_named(load, monkeypatch):
    """A stack works if one of its layers can be removed; a difference of any of them is wrong."""
    drop, case = load("architecture_drop"), load("tiny_architectures").Case("llama")
    right = drop.drop

    def refuses(layers):
        def refusing(model, layer, *args):
            if layer in layers:
                raise ValueError(f"layers: expected another layer, got {layer}")
            return right(model, layer, *args)

        return refusing

    tried = load("architectures").tried
    monkeypatch.setattr(drop, "drop", refuses([0, 3]))
    found = tried(case, "drop")
    assert found["result"] == "works" and re.search("^layer 0 is refused: .* got 0; layer 3 is refused", found["why"])
    monkeypatch.setattr(drop, "drop", refuses([0, 1, 3]))
    assert tried(case, "drop") == {"result": "refused", "why": "layers: expected another layer, got 0"}


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl", "idefics3", "lfm2_vl", "mllama", "minicpmv4_6"])
def test_images_are_read(load, kind):
    """Each in its own form; other images give other outputs, and the vision tower runs."""
    images, case = load("architecture_images"), load("tiny_architectures").Case(f"vision-language/{kind}+images")
    model, called = case.build(), []
    find_decoder_layers(model, "vision")[-1].register_forward_hook(lambda *_: called.append(True))
    (batch, _) = load("architecture_inputs").batches_for(case, model)
    found = load("architecture_comparison").outputs(model, batch)
    assert called and found.isfinite().all() and images.form_of(case) is images.form_of(case.without_images)
    (name,) = [name for name in batch if name == "pixel_values"]
    other = load("architecture_comparison").outputs(model, {**batch, name: batch[name].roll(1, -1)})
    assert not torch.equal(found, other)


def test_kinds_without_images_are_not_run(load, tmp_path, monkeypatch):
    images, sweep = load("architecture_images"), load("architectures")
    monkeypatch.setattr(images, "FORMS", ())
    images._form_of.cache_clear()
    kind = "vision-language/llava+images@vision"
    found = sweep.sweep([kind], tmp_path, ["prune", "drop"])[kind]
    assert found["prune"]["result"] == found["drop"]["result"] == "not run"
    told = sweep.tried(load("tiny_architectures").Case("vision-language/llava"), "drop")
    assert told["result"] == "excluded" and "the vision stack is not run on images: " in told["why"]
    images._form_of.cache_clear()
    assert "not run on images: its forward takes no known form" in (tmp_path / "architectures.md").read_text()
