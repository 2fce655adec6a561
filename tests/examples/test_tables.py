"""What the tables of examples/ try, and what they take for known."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_cod.io.models import embedded_model, load_model

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [name for name, m in sys.modules.items() if getattr(m, "__file__", None) and str(FOLDER) in m.__file__]:
        del sys.modules[name]


def test_what_is_healed_otherwise_is_another_entry(load):
    tables, tokenizer = load("table_healing"), load_model(embedded_model("lns"))[1]

    def key(*options):
        parser = argparse.ArgumentParser()
        tables.add_healing(parser)
        parser.set_defaults(text=None, report_text=None, sequence_length=64)
        return tables.Healing(None, tokenizer, parser.parse_args(options)).key("cell")

    options = [], ["--heal", "1k"], *(["--heal", "1k", *more] for more in (["--heal-batch", "8"], ["--heal-bf16"]))
    assert len({key(*given) for given in options}) == 4 and key() == "cell healed"


def test_methods_are_tried_by_ranks_that_they_take(load):
    table = load("rank_table")
    bench = object.__new__(table.Bench)
    tried = {method: {score for score, *_ in bench.tried(method, "auto", 0.8)} for method in table.METHODS}
    assert tried["whitened"] == {"uniform", "owl", "angular", "spectrum", "fisher"}
    assert tried["plain"] == tried["whitened"] - {"fisher"}
    assert tried["oats"] == {"uniform", "owl", "angular"}


def save_mixture(directory, tokenizer):
    """A random mixture with the vocabulary of a tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    few = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 32}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **few)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_experts_go_by_each_score_and_are_healed(load, tmp_path, monkeypatch):
    """Each seed removes others, more routes end at experts of a high score, and a second call measures nothing."""
    table, tokenizer = load("experts_table"), load_model(embedded_model("pre"))[1]
    save_mixture(tmp_path / "mixture", tokenizer)
    options = ["--model", str(tmp_path / "mixture"), "--output", str(tmp_path / "table"), "--sequence-length", "32"]
    options += ["--scores", "frequency", "random", "--seeds", "2", "--shares", "0.5", "--methods", "removed", "merged"]
    options += ["--calibration-samples", "4", "--tuning-samples", "4", "--report-samples", "4"]
    options += ["--heal", "64", "--heal-batch", "2", "--heal-scores", "frequency"]
    monkeypatch.setattr(sys, "argv", ["experts_table.py", *options])
    table.main()
    found = json.loads((tmp_path / "table" / "table.json").read_text())
    rows = {(row["method"], row["score"]): row for row in found["rows"]}
    assert list(rows) == [(m, s) for m in ("removed", "merged") for s in ("frequency", "random 0", "random 1")]
    routes = [rows["removed", score]["removed_token_share"] for score in ("frequency", "random 0", "random 1")]
    assert routes[0] == min(routes) and len(set(routes)) == 3
    assert rows["removed", "frequency"]["perplexity"] != rows["merged", "frequency"]["perplexity"]
    assert [row["healed"] is not None for row in found["rows"]] == [True, False, False] * 2
    page = (tmp_path / "table" / "table.md").read_text()
    monkeypatch.setattr(table.Bench, "make", lambda *_: pytest.fail("it was measured again"))
    table.main()
    assert (tmp_path / "table" / "table.md").read_text() == page


def test_bits_of_experts(load, tmp_path, monkeypatch):
    """All choices keep their budget, compensation is another rounding, and a second call measures nothing."""
    table, tokenizer = load("expert_bits_table"), load_model(embedded_model("pre"))[1]
    save_mixture(tmp_path / "mixture", tokenizer)
    options = ["--model", str(tmp_path / "mixture"), "--output", str(tmp_path / "table"), "--sequence-length", "32"]
    options += ["--calibration-samples", "4", "--tuning-samples", "4", "--report-samples", "4", "--seeds", "2"]
    choices = ["all in 4 bits", "uniform", "layer: owl", "layer: random", "expert: reap", "expert: random"]
    monkeypatch.setattr(sys, "argv", ["expert_bits_table.py", *options, "--choices", *choices])
    table.main()
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert [row["choice"] for row in rows[::2]] == [c for c in choices for _ in range(1 + c.endswith("random"))]
    found = {(row["choice"], row["rounding"], row["seed"]): row for row in rows}
    assert all(row["bits"] <= 3.51 for row in found.values() if ":" in row["choice"])
    assert found["uniform", "nearest", 0]["bits"] < found["all in 4 bits", "nearest", 0]["bits"]
    assert len({row["perplexity"] for row in rows}) > len(choices)
    page = (tmp_path / "table" / "table.md").read_text()
    monkeypatch.setattr(table.Bench, "measure", lambda *_: pytest.fail("it was measured again"))
    table.main()
    assert (tmp_path / "table" / "table.md").read_text() == page and "| expert: reap |" in page


def test_sparsities_of_experts(load, tmp_path, monkeypatch):
    """All plans keep their budget, and a second call measures nothing."""
    table, tokenizer = load("expert_sparsity_table"), load_model(embedded_model("pre"))[1]
    save_mixture(tmp_path / "mixture", tokenizer)
    options = ["--model", str(tmp_path / "mixture"), "--output", str(tmp_path / "table"), "--sequence-length", "32"]
    options += ["--calibration-samples", "4", "--tuning-samples", "4", "--report-samples", "4", "--seeds", "2"]
    choices = ["uniform", "layer: angular", "expert: reap", "expert: random"]
    options += ["--choices", *choices, "--methods", "wanda", "--sparsities", "0.6"]
    made, plan_of = [], table.Bench.plan
    monkeypatch.setattr(table.Bench, "plan", lambda *given: made.append(plan_of(*given)) or made[-1])
    monkeypatch.setattr(sys, "argv", ["expert_sparsity_table.py", *options])
    table.main()
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert [row["choice"] for row in rows] == [*choices, choices[-1]]
    assert all(plan.mean == pytest.approx(0.6) for plan in made)
    assert len({row["perplexity"] for row in rows}) == len(rows)
    page = (tmp_path / "table" / "table.md").read_text()
    monkeypatch.setattr(table.Bench, "measure", lambda *_: pytest.fail("it was measured again"))
    table.main()
    assert (tmp_path / "table" / "table.md").read_text() == page and "| expert: reap |" in page


def test_smaller_experts(load, tmp_path, monkeypatch):
    """Factors get no more weights than the channels that are kept, and a second call measures nothing."""
    table, tokenizer = load("expert_rank_table"), load_model(embedded_model("pre"))[1]
    save_mixture(tmp_path / "mixture", tokenizer)
    options = ["--model", str(tmp_path / "mixture"), "--output", str(tmp_path / "table"), "--sequence-length", "32"]
    options += ["--calibration-samples", "4", "--tuning-samples", "4", "--report-samples", "4", "--shares", "0.5"]
    monkeypatch.setattr(table, "METHODS", ("magnitude",))
    monkeypatch.setattr(table, "SPREADS", (0.2,))
    monkeypatch.setattr(sys, "argv", ["expert_rank_table.py", *options])
    table.main()
    rows = {row["way"]: row for row in json.loads((tmp_path / "table" / "table.json").read_text())["rows"]}
    assert [*rows] == ["removed", "narrowed", "own", "shared"]
    most, kept = rows["narrowed"]["kept"], [rows[way]["kept"] for way in ("own", "shared")]
    assert most - 0.02 < min(kept) and max(kept) <= most == pytest.approx(0.5, abs=0.1)
    page = (tmp_path / "table" / "table.md").read_text()
    monkeypatch.setattr(table.Bench, "make", lambda *_: pytest.fail("it was made again"))
    table.main()
    assert (tmp_path / "table" / "table.md").read_text() == page and "| shared | " in page
