"""The script that trains the mixture for tests, with a tiny one."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod.io.files import write_json
from hf_cod.io.report import RunReport
from hf_cod.io.text import embedded_text

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = "--layers 2 --hidden-size 64 --experts 4 --expert-width 16 --steps 4 --batch-size 2 --sequence-length 16"
TINY += " --log-every 1 --save-every 2 --evaluate-every 4 --diagnose-every 2 --validation-samples 4"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, which writes to the test's directory."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    cached = lambda library_name, namespace, subfolder: tmp_path / "cache" / namespace / subfolder  # noqa: E731
    monkeypatch.setattr("hf_cod.training.pretraining.preparation.cached_assets_path", cached)
    found = importlib.import_module("build_mixture")
    monkeypatch.setattr(sys.modules["shipped_models"], "ROOT", tmp_path)
    monkeypatch.setattr(found, "MIXTURE", tmp_path / "mixture")
    monkeypatch.setattr(found, "HELD_OUT", tmp_path / "held_out.txt")
    yield found
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(f"{EXAMPLES}/")]:
        del sys.modules[name]


def test_a_tiny_mixture_is_trained_measured_and_shipped(script, tmp_path, monkeypatch, capsys):
    corpus, pieces = tmp_path / "corpus", [embedded_text()[i : i + 1000] for i in range(0, 20_000, 1000)]
    corpus.mkdir()
    (corpus / "train.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    (tmp_path / "held_out.txt").write_text(pieces[3] + "\n\n" + pieces[7])
    write_json(corpus / "sources.json", {"sources": {}})
    options = [*TINY.split(), "--text", str(corpus / "train.jsonl"), "--output", str(tmp_path / "run")]
    script.main(options)
    assert "2 of 20 pieces are of the held-out text and are excluded" in capsys.readouterr().out
    trained_on = [json.loads(line)["text"] for line in (corpus / "mixture_train.jsonl").read_text().splitlines()]
    assert trained_on == [piece for number, piece in enumerate(pieces) if number not in (3, 7)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert model.config.model_type == "qwen3_moe" and model.dtype == torch.bfloat16
    assert not model.config.output_router_logits and not hasattr(model.config, "auto_map")
    results = RunReport.load(tmp_path / "run").results
    assert len(results["expert_usage"]) == 2
    assert all(sum(shares) == pytest.approx(2) for shares in results["expert_usage"].values()), "two for each token"
    assert results["expert_parameters"] == 2 * 4 * 3 * 64 * 16
    assert results["active_parameters"] == model.num_parameters() - results["expert_parameters"] / 2
    card = (tmp_path / "model_cards" / script.NAME / "README.md").read_text(encoding="utf-8")
    assert "A Qwen3Moe of 2 layers" in card and "routed to 2. Experts hold" in card and "trust_remote_code" not in card
    monkeypatch.setattr(script, "pretrain", lambda *_: pytest.fail("it was trained again"))
    script.main(options)


def test_what_cannot_be_trained_is_one_line(script):
    for told, given in (
        ("text: expected train.jsonl", {"text": None}),
        ("hidden_size: expected a multiple of 64, got 96", {"hidden_size": 96}),
        ("experts_per_token: expected at most 2, got 4", {"experts": 2, "experts_per_token": 4}),
        ("balance: expected a weight of at least 0", {"balance": -1.0}),
    ):
        with pytest.raises(ValueError, match=told):
            script.MixtureSettings(**{"text": "train.jsonl", **given})
