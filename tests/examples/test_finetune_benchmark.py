"""The fine-tuning benchmark, through its command line, on an embedded model and real tasks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hf_cod.io.models import embedded_model
from hf_cod.training.runs.methods import METHODS

SLOW = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
QUICK = ["--model", embedded_model("lns"), "--steps", "4", "--seeds", "2", "--train-rows", "32", "--test-rows", "20"]
QUICK += ["--validation-rows", "20", "--validation-windows", "4", "--test-windows", "4", "--text-tokens", "32"]
QUICK += ["--n-active", "3", "--rank", "16"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("finetune_benchmark", FOLDER / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name, m in sys.modules.items() if getattr(m, "__file__", None) and str(FOLDER) in m.__file__]:
        del sys.modules[name]


@pytest.mark.parametrize("tasks", [["text"], pytest.param(["reuters", "text"], marks=pytest.mark.real)])
def test_quality_of_methods_and_resumption(tasks, benchmark, tmp_path, monkeypatch):
    command = [*QUICK, "--quality", "--methods", "owlore", "lora", "--rates", "1e-3", "3e-3", "--output", str(tmp_path)]
    command += ["--tasks", *tasks]
    benchmark.main(command)
    found = json.loads((tmp_path / "quality.json").read_text())
    assert [(row["task"], row["method"]) for row in found["rows"]] == [
        (task, method) for task in tasks for method in ("owlore", "lora")
    ]
    assert all(len(row["loss"]) == 2 and 0 < row["accuracy"][0] < 1 for row in found["rows"])
    monkeypatch.setattr(benchmark, "train", lambda *_: pytest.fail("trained again"))
    (tmp_path / "quality.json").unlink()
    benchmark.main(command)
    assert json.loads((tmp_path / "quality.json").read_text()) == found


@pytest.mark.parametrize(
    "methods", [["owlore", "lora"], pytest.param([m for m in METHODS if m not in ("owlore", "lora")], marks=SLOW)]
)
def test_estimates_of_memory_are_within_five_percent_of_the_allocator(methods, benchmark, tmp_path):
    """With and without activation checkpointing."""
    benchmark.main([*QUICK, "--memory", "--methods", *methods, "--cost-tokens", "64", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= set(methods)
    for row in rows:
        assert row["total"] == pytest.approx(row["measured"], rel=0.05), row
    peaks = {(row["method"], row["checkpointing"]): row["measured"] for row in rows}
    for checkpointing in (False, True) if "lora" in methods else ():
        assert peaks["owlore, fused", checkpointing] <= peaks["owlore", checkpointing] < peaks["lora", checkpointing]


def test_a_claim_without_its_method_and_a_table_of_what_did_not_fit(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--claim-7b", "--methods", "lora"])
    assert "expected owlore among --methods, got ['lora']" in capsys.readouterr().err
    assert benchmark.memory_table([{"method": "full", "checkpointing": True, "measured": None}]).count("\n") == 2


def test_times_are_ratios_to_lora(benchmark, tmp_path):
    quick = ["--methods", "owlore", "--rounds", "2", "--cost-tokens", "16", "--output", str(tmp_path)]
    benchmark.main([*QUICK, "--time", *quick])
    rows = json.loads((tmp_path / "time.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["lora", "owlore"] and rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0


def test_rounding_is_compared(benchmark, tmp_path):
    quick = ["--tasks", "text", "--rates", "1e-3", "--output", str(tmp_path)]
    benchmark.main([*QUICK, "--rounding", *quick])
    rows = json.loads((tmp_path / "rounding.json").read_text())["rows"]
    losses = [row["loss"][0] for row in rows]
    assert len(set(losses)) == 3 and max(losses) < 1.05 * min(losses)


def test_the_best_rate_is_found_downhill(benchmark):
    asked = []

    def cost(rate):
        asked.append(rate)
        return {1.0: 5, 2.0: 3, 4.0: 2, 8.0: 4, 16.0: 1}[rate]

    assert benchmark.lowest([1.0, 2.0, 4.0, 8.0, 16.0], 1.9, cost) == 4.0
    assert 16.0 not in asked  # behind a hill
    assert benchmark.lowest([1.0, 2.0], 1.9, cost) == 2.0
