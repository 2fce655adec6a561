"""The files of engines that quantize by themselves, read as the engines read them."""

import fnmatch
import json
import re

import pytest
import yaml

from hf_cod import export
from hf_cod.compression.export.settings import TARGETS as NAMES
from hf_cod.compression.export.targets import TARGETS
from tests.compression.export.models import llama, scores


def exported(tmp_path, to, bits, **sizes):
    model = llama(**sizes)
    return model, export(model, tmp_path, to=to, bits=bits, scores=scores(model, [1.0, 3.0, 2.0]))


def test_the_tables_agree():
    assert [*TARGETS] == [*NAMES] and all(target.name == name for name, target in TARGETS.items())
    assert all([*target.widths] == sorted(target.widths) for target in TARGETS.values())


def dynamic_bits(config, name):
    """As GPTQModel does: the first rule whose expression matches the name."""
    for rule, override in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else override["bits"]
    return config["bits"]


def test_gptqmodel(tmp_path):
    _, report = exported(tmp_path, "gptqmodel", 3.6)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert (config["group_size"], config["sym"], config["desc_act"]) == (64, True, False)
    widths = report.results["module_bits"]
    assert {*widths.values()} == {3, 4} and len(config["dynamic"]) <= 14
    assert {name: dynamic_bits(config, name) for name in widths} == widths
    assert len(widths) == 21 and "QuantizeConfig.from_pretrained('.')" in report.summary[1]


def test_gptqmodel_leaves_out_what_is_excluded(tmp_path):
    model = llama()
    model.model.layers[1].mlp.down_proj = type(model.lm_head)(120, 64, bias=False)
    export(model, tmp_path, to="gptqmodel", bits=4.4)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert dynamic_bits(config, "model.layers.1.mlp.down_proj") is None
    assert dynamic_bits(config, "model.layers.11.mlp.down_proj") == 4


def test_auto_round(tmp_path):
    _, report = exported(tmp_path, "auto-round", 3.6)
    config = json.loads((tmp_path / "layer_config.json").read_text())
    base = int(re.search(r"bits=(\d)", report.summary[1])[1])
    widths = report.results["module_bits"]
    assert {name: config.get(name, {"bits": base})["bits"] for name in widths} == widths
    assert {tuple(sorted(entry)) for entry in config.values()} == {("bits", "group_size", "sym")}


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_finds_the_same_widths_by_its_own_search(tmp_path, tied):
    model, report = exported(tmp_path, "mlx", 3.9, tie_word_embeddings=tied)
    widths = report.results["module_bits"]
    quantization = json.loads((tmp_path / "quantization.json").read_text())["quantization"]
    assert {name: quantization.get(name, quantization)["bits"] for name in widths} == widths
    sensitivities = dict(json.loads((tmp_path / "sensitivities.json").read_text()))
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Embedding")}
    if tied:
        del sizes["lm_head"]
    assert sensitivities.keys() == sizes.keys()
    options = dict(re.findall(r"--([\w-]+) ([\d.]+)", report.summary[1]))
    low, high, target = int(options["low-bits"]), int(options["high-bits"]), float(options["target-bpw"])
    assert (low, high) == (3, 4) and options["low-group-size"] == options["high-group-size"] == "64"
    first, last = 0.0, 1.0  # the bisection of mlx_lm.dynamic_quant
    while last - first > 1e-3:
        middle = (first + last) / 2
        chosen = {n: high if sensitivities[n] > middle else low for n in sizes}
        spent = sum(sizes[n] * (width + 32 / 64) for n, width in chosen.items()) / sum(sizes.values())
        first, last = (middle, last) if spent > target else (first, middle)
    threshold = (first + last) / 2
    assert {name: high if sensitivities[name] > threshold else low for name in widths} == widths


def test_mlx_of_one_width(tmp_path):
    _, report = exported(tmp_path, "mlx", 4.5)
    assert report.summary[1] == "On a Mac: mlx_lm.convert -q --hf-path MODEL --q-bits 4 --q-group-size 64"


def test_exl3(tmp_path):
    _, report = exported(tmp_path, "exl3", 3.7, hidden_size=128, num_key_value_heads=4)
    content = yaml.safe_load((tmp_path / "override.yaml").read_text())
    sources = {entry["id"]: entry["model_dir"] for entry in content["sources"]}
    base = int(re.search(r"-i exl3-(\d)bpw", report.summary[1])[1])
    widths = report.results["module_bits"]
    found = {}
    for name in widths:
        keys = [o for o in content["overrides"] if fnmatch.fnmatch(f"{name}.trellis", o["key"])]
        found[name] = keys[0]["source"] if keys else base
    assert found == widths and {*sources} == {3, 4} - {base} and [*sources.values()] == [f"exl3-{7 - base}bpw"]


def test_exl3_of_one_width(tmp_path):
    exported(tmp_path, "exl3", 8 + 16 * (128 + 128) / 128**2, hidden_size=128, num_key_value_heads=4)
    assert yaml.safe_load((tmp_path / "override.yaml").read_text()) == {"sources": [], "overrides": []}


@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if not target.rounds])
def test_the_model_is_not_changed(to, tmp_path):
    model = llama(hidden_size=128, num_key_value_heads=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path, to=to, bits=5)
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    assert not (tmp_path / "model.safetensors").exists()
