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


def test_experts_go_by_each_score_and_are_healed(load, tmp_path, monkeypatch):
    """Each seed removes others, more routes end at experts of a high score, and a second call measures nothing."""
    table, tokenizer = load("experts_table"), load_model(embedded_model("pre"))[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    few = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **few)).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
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
