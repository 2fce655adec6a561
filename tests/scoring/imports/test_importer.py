"""Scores and plans of other tools, as they write them."""

import json
import re

import pytest

from hf_cod import (
    LayerAllocation,
    LayerScores,
    allocate,
    collect_statistics,
    export,
    find_decoder_layers,
    import_plan,
    import_scores,
    plan_bits,
    prune,
    score_layers,
)
from tests.compression.export.models import batches, llama


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def names(model):
    stack = find_decoder_layers(model)
    return [name for index in range(len(stack)) for name in stack.linears(index)]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_sensitivities_of_mlx(model, names, tmp_path, caplog):
    numbers = [[name, float(place % 5)] for place, name in enumerate(names)]
    file = written(tmp_path / "s.json", [*numbers, ["model.embed_tokens", 9.0], ["lm_head", 9.0]])
    scores = import_scores(model, file)
    assert {name: part.value for part in scores.parts for name in part.sizes} == dict(numbers)
    assert scores.method == "mlx" and scores.granularity == "module"
    assert "2 modules outside of the layers are left out: model.embed_tokens, lm_head" in caplog.text
    weights = {name: module.weight.numel() for name, module in model.named_modules() if name in names}
    first = [name for name in names if ".layers.0." in name]
    mean = sum(dict(numbers)[name] * weights[name] for name in first) / sum(weights[name] for name in first)
    assert scores.values[0] == pytest.approx(mean)
    scores.save(tmp_path / "scores.json")
    assert LayerScores.load(tmp_path / "scores.json") == scores
    assert len({*plan_bits(model, 3.6, scores=scores).bits.values()}) == 2
    zeros = allocate(scores, "sparsity", 0.5, granularity="module")
    assert zeros.modules[names[4]] < zeros.modules[names[5]]  # numbers 4 and 0
    with pytest.raises(ValueError, match="plan: expected bits, got sensitivities; use import_scores"):
        import_plan(model, file)


@pytest.mark.parametrize("to", ["mlx", "auto-round"])
def test_plans_that_export_writes(model, to, tmp_path):
    plan = allocate(import_scores(model, written(tmp_path / "t.csv", by_layer(1, 3, 2))), "bits", 3.4)
    report = plan.export(model, tmp_path / "out", to)
    rest = {"rest": float(re.search(r"bits=(\d)", report.summary[1])[1])} if to == "auto-round" else {}
    file = tmp_path / "out" / {"mlx": "quantization.json", "auto-round": "layer_config.json"}[to]
    read = import_plan(model, file, **rest)
    assert read.modules == report.results["module_bits"] and read.method == to
    again = read.export(model, tmp_path / "again", "gptqmodel")
    assert again.results["module_bits"] == report.results["module_bits"]
    assert import_plan(model, json.loads(file.read_text()), **rest) == read


def by_layer(*values):
    return "module,score\n" + "".join(f"model.layers.{index}.,{value}\n" for index, value in enumerate(values))


def test_the_longest_name_applies(model, names, tmp_path):
    mlp, up = "model.layers.1.mlp", "model.layers.1.mlp.up_proj"
    file = written(tmp_path / "t.csv", by_layer(0.5, 0.6, 0.7) + f"{up},0.1\n{mlp},0.2\n")
    plan = import_plan(model, file, "sparsity")
    layer = [0.5, 0.6, 0.7]
    by_hand = {name: 0.1 if name == up else 0.2 if mlp in name else layer[int(name.split(".")[2])] for name in names}
    assert plan.modules == by_hand
    assert plan.mean == pytest.approx(plan.budget)
    plan.save(tmp_path / "allocation.json")
    pruned = llama()
    prune(pruned, LayerAllocation.load(tmp_path / "allocation.json"), method="magnitude")
    for name in (up, f"{mlp}.down_proj", names[0]):
        weight = pruned.get_submodule(name).weight
        assert (weight == 0).float().mean() == pytest.approx(by_hand[name], abs=0.02)


def test_what_is_not_quantized_is_left_out(model, names, tmp_path):
    config = {name: {"bits": 16 if name == names[3] else 4, "data_type": "int"} for name in names}
    report = export(model, tmp_path, plan=import_plan(model, config), to="auto-round")
    assert report.results["module_bits"].keys() == {*names} - {names[3]}
    assert any("16 bits in the plan" in note for note in report.notes)


def test_an_importance_matrix(model, tmp_path):
    statistics = collect_statistics(model, batches(model))
    file = statistics.save(tmp_path / "imatrix.gguf", model=model)
    assert import_scores(model, file).values == score_layers(model, statistics, "owl").values


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", [["model.layers.9.mlp.up_proj", 1.0]], "that it does not have, the first 'model.layers.9.mlp"),
        ("s.json", [["model.layers.0", 1.0]], "got none for 14 of 21, the first model.layers.1"),
        ("s.json", [["model.layers.0"]], r"sensitivities[0]: expected a path and a number"),
        ("s.json", [["model", 1.0], ["model", 2.0]], "sensitivities[1]: expected each path once"),
        ("s.json", [["model", True]], "expected a finite number, got True"),
        ("s.json", {"model": {"group_size": 128}}, "model: expected settings with bits, got {'group_size': 128}"),
        ("s.json", {"model": {"bits": 0}}, "model: expected bits above 0, got 0"),
        ("s.json", {}, "expected a list of [module, number]"),
        ("s.json", 3, "expected a list of [module, number]"),
        ("t.csv", "model,1,2\n", "line 1: expected module,number, got 'model,1,2'"),
        ("t.csv", "name,value\nmodel,much\n", "line 2: expected a finite number, got 'much'"),
        ("t.csv", "model,1\nmodel,2\n", "line 2: expected each module once"),
        ("t.csv", "model,nan\n", "line 1: expected a finite number, got nan"),
        ("t.csv", "", "expected a number for each matrix of the layers, got none for 21 of 21"),
    ],
)
def test_bad_files(model, tmp_path, name, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        import_scores(model, written(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_bad_plans(model, names, tmp_path):
    with pytest.raises(ValueError, match="plan: expected bits, got an importance matrix"):
        import_plan(model, tmp_path / "imatrix.gguf")
    with pytest.raises(ValueError, match="plan: expected sparsity, got bits of auto-round"):
        import_plan(model, {"model": {"bits": 4}}, "sparsity")
    with pytest.raises(ValueError, match=r"expected sparsity in 0\.\.1, got 3"):
        import_plan(model, written(tmp_path / "t.csv", "model,3\n"), "sparsity")
    with pytest.raises(ValueError, match="plan: expected a number for each matrix"):
        import_plan(model, {names[0]: {"bits": 4}})
    plan = import_plan(model, written(tmp_path / "t.csv", "model,3.5\n"))
    with pytest.raises(ValueError, match=r"plan: expected widths of gptqmodel \(2, 3, 4, 8 bits\), got 3\.5"):
        plan.export(model, tmp_path / "out", "gptqmodel")
    with pytest.raises(ValueError, match="plan: expected bits of 4 layers, got 3"):
        plan.export(llama(4), tmp_path / "out", "gptqmodel")
