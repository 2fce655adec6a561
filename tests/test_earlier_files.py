"""Files that earlier versions wrote: they load, mean what they meant, and interrupted work resumes.

One folder a version, written by tests/earlier_files/write.py with that version and never changed afterwards. All goes
through names that a user has: hf_cod's public ones, its command line, and transformers' Auto classes.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_cod import (
    DepthPlan,
    FitPlan,
    LayerAllocation,
    LayerScores,
    LayerStatistics,
    OwlBnbConfig,
    OwLoreAdamW,
    OwLoreConfig,
    RankPlan,
    RunReport,
    TrainingHistory,
    WidthPlan,
    drop_layers,
    factorize,
    narrow,
    prune,
    quantize,
    score_layers,
)
from hf_cod.cli import main
from tests.earlier_files.read import EXPECTED, FILES, TENSORS, VERSIONS, cases, check_logits, copy_to, files, source


@pytest.fixture
def copied(tmp_path, monkeypatch):
    def copy(version):
        folder = copy_to(tmp_path, version)
        monkeypatch.chdir(folder)
        return folder

    return copy


@pytest.mark.parametrize("version, name", cases(lambda version: files(version, "models")))
def test_checkpoints(version, name):
    auto = AutoModelForImageClassification if "vit" in name else AutoModelForCausalLM
    model, told = auto.from_pretrained(FILES / version / "models" / name, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    check_logits(version, f"models/{name}", model)


STRANGER = """
import sys, torch
sys.modules["hf_cod"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
path, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
found = model(expected["input_ids"]).logits
torch.testing.assert_close(found, expected["models/cod_llama"], rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_code_that_travelled_loads_without_the_package(version, tmp_path):
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    path, expected = FILES / version / "models" / "cod_llama", FILES / version / "expected.safetensors"
    command = [sys.executable, "-c", STRANGER, path, expected]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("version", VERSIONS)
def test_adapter(version):
    assert OwLoreConfig  # PEFT knows the method once this is imported
    model = PeftModel.from_pretrained(source(version), FILES / version / "adapter")
    check_logits(version, "adapter", model)
    assert not torch.allclose(TENSORS[version]["adapter"], TENSORS[version]["models/source"], atol=1e-2)


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics(version):
    statistics = LayerStatistics.load(FILES / version / "statistics.safetensors")
    scores = score_layers(source(version), statistics, method="owl", threshold=3.0)
    assert scores.values == pytest.approx(EXPECTED[version]["scores"]["owl"])


@pytest.mark.parametrize("version, name", cases(lambda version: EXPECTED[version]["scores"]))
def test_scores(version, name):
    scores = LayerScores.load(FILES / version / "scores" / f"{name}.json")
    assert scores.method == name and scores.values == EXPECTED[version]["scores"][name]
    assert bool(scores.remarks) == (name == "auto")


APPLIED = {
    "sparsity": prune,
    "pattern": prune,
    "rank": lambda model, plan: factorize(model, plan, "plain"),
    "parameter_share": lambda model, plan: factorize(model, plan, "plain"),
    "bits": lambda model, plan: quantize(model, OwlBnbConfig(allocation=plan)),
    "probability": lambda model, plan: OwLoreAdamW(model, plan, n_active=2, rank=4),
}
APPLIED["parameters"] = APPLIED["parameter_share"]  # as version 0.1 called it
BUDGETS = {"sparsity": 0.6, "pattern": 0.5, "rank": 0.6, "parameter_share": 0.7, "bits": 3.5, "probability": 0.5}
BUDGETS["parameters"] = BUDGETS["parameter_share"]


@pytest.mark.parametrize("version, file", cases(lambda version: files(version, "allocations")))
def test_allocations(version, file):
    name = file.removesuffix(".json")
    plan = LayerAllocation.load(FILES / version / "allocations" / file)
    assert plan.kind == {"pattern": "sparsity", "parameters": "parameter_share"}.get(name, name)
    assert plan.group == (8 if name == "pattern" else None)
    assert plan.mean == pytest.approx(BUDGETS[name], abs=0.03) and len(set(plan.values)) > 1
    model = source(version)
    options = {"method": "magnitude"} if APPLIED[name] is prune else {}
    made = APPLIED[name](model, plan, **options)
    if name == "sparsity":
        zeros = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in model.model.layers]
        assert zeros == pytest.approx(plan.values, abs=0.01)
    if name == "probability":
        assert made.sampler.probabilities == pytest.approx(plan.values)


@pytest.mark.parametrize("version", VERSIONS)
def test_plans(version):
    folder, expected = FILES / version / "plans", EXPECTED[version]["plans"]
    ranks, depth = RankPlan.load(folder / "rank.json"), DepthPlan.load(folder / "depth.json")
    assert ranks.ranks == expected["rank"] and depth.layers == expected["depth"] and depth.costs
    model = source(version)
    factorize(model, ranks, "plain")
    found = {n: len(m.weight) for n, m in model.named_modules() if n.endswith(".reduce")}
    assert found == {f"{name}.reduce": rank for name, rank in expected["rank"].items()}
    model = source(version)
    drop_layers(model, depth)
    assert model.config.num_hidden_layers == 4 - len(expected["depth"])
    model = source(version)
    narrow(model, WidthPlan.load(folder / "width.json"), "magnitude", compensation="none")
    assert [len(layer.mlp.up_proj.weight) for layer in model.model.layers] == expected["width"]
    plan = FitPlan.load(folder / "fit.json")
    assert plan.kind == "bits" and set(plan.alone) == {"rank", "bits"} and plan.steps
    assert plan.loss == min(row["loss"] for row in plan.tried)


@pytest.mark.parametrize("version", VERSIONS)
def test_history(version, copied):
    copied(version)
    history = TrainingHistory.load("history.jsonl")
    assert [line["step"] for line in history.lines] == EXPECTED[version]["history"]["steps"]
    assert all(len(line["gradient_norm"]) == 4 for line in history.lines)
    assert main(["history", "history.jsonl", "--output", "told", "--no-plots"]) == 0
    assert RunReport.load("told").layers == RunReport.load("reports/history").layers


@pytest.mark.parametrize("version, name", cases(lambda version: files(version, "reports")))
def test_reports(version, name, tmp_path):
    path = FILES / version / "reports" / name
    report, written = RunReport.load(path), json.loads((path / "report.json").read_text())
    for field in ("kind", "model", "settings", "layers", "results", "summary", "notes"):
        assert getattr(report, field) == written[field], field
    assert report.plot().axes  # drawn, not written: that takes the time
    assert RunReport.load(report.save(tmp_path)) == report


@pytest.mark.parametrize("version", VERSIONS)
def test_comparison(version, copied):
    folder = copied(version)
    shutil.copytree("reports/diagnose", "again")
    assert main(["compare", "reports/diagnose", "again", "--labels", "one", "two", "--output", "side"]) == 0
    assert (folder / "side" / "compare.png").is_file() and "two" in (folder / "side" / "compare.md").read_text()
