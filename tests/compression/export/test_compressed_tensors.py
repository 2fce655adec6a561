"""Checkpoints of compressed-tensors: names, groups, and logits of stock transformers in a process without hf_cod."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_architectures import build as tiny_architecture
from hf_cod import collect_statistics, export, find_decoder_layers, perplexity, quantize, split_samples, token_batches
from hf_cod.compression.export.compressed_tensors import WIDTHS
from tests.compression.export.models import batches, llama, scores
from tests.tiny_models import build

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "hf_cod" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[2])
"""


def logits_of_stock(directory, ids, tmp_path):
    torch.save(ids, tmp_path / "tensor.pt")
    words = [sys.executable, "-c", STOCK, str(directory), str(tmp_path / "tensor.pt")]
    subprocess.run(words, check=True, cwd=tmp_path, capture_output=True)
    return torch.load(tmp_path / "tensor.pt")


@pytest.mark.process
@pytest.mark.parametrize("family, bits", [("llama", 3.9), ("llama_tied", 3.9), ("qwen3", 4.6)])
def test_stock_transformers_gives_our_logits(family, bits, tmp_path):
    pytest.importorskip("compressed_tensors")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build(family, 3, **sizes)
    export(model, tmp_path / "out", bits=bits, scores=scores(model, [1.0, 3.0, 2.0]), batches=batches(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {3, 4} == {group["weights"]["num_bits"] for group in config["config_groups"].values()} < {*WIDTHS}
    ids = batches(model)[0]["input_ids"]
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits_of_stock(tmp_path / "out", ids, tmp_path), ours, rtol=0, atol=1e-5)


def test_each_matrix_is_in_one_group_and_nothing_else(tmp_path):
    model = llama()
    report = export(model, tmp_path, bits=3.8, batches=batches(model))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"] and config["format"] == "pack-quantized"
    widths = report.results["module_bits"]
    for prefix in ("", "model."):  # of a model without a head, and with one
        for name, module in model.named_modules():
            name = name if prefix else name.removeprefix("model.")
            hits = [
                group["weights"]["num_bits"]
                for group in config["config_groups"].values()
                for target in group["targets"]
                if re.match(target.removeprefix("re:"), name)
            ]
            inside = isinstance(module, nn.Linear) and ".layers." in f".{name}"
            assert hits == ([widths[f"model.{name.removeprefix('model.')}"]] if inside else []), name


def test_another_stack_with_the_same_end_of_its_name_is_not_matched(tmp_path):
    model = llama(layers=2)
    model.tower = nn.Module()
    model.tower.layers = nn.ModuleList([nn.Module() for _ in range(2)])
    for layer in model.tower.layers:
        layer.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 64)})
    export(model, tmp_path, bits=3.8, layers_path="model.layers")
    targets = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert all(t.startswith(r"re:model\.layers") for group in targets.values() for t in group["targets"])


def test_the_file_and_the_report(tmp_path):
    model = llama()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export(model, tmp_path, bits=3.7, batches=batches(model), name="tiny")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert f"{name}.weight" not in tensors
    assert tensors[f"{name}.weight_shape"].tolist() == [64, 128]
    assert tensors[f"{name}.weight_scale"].shape == (64, 2)
    bits = report.results["module_bits"][name]
    assert tensors[f"{name}.weight_packed"].shape == (64, 128 * bits // 32)
    stored = sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.endswith(("weight_packed", "weight_scale"))
    )
    assert stored == report.results["planned_bytes"]
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(tensors[key], dense[key])
    assert report.kind == "export" and report.model == "tiny" and report.settings["to"] == "compressed-tensors"
    assert len(report.layers["error"]) == 3 and all(0 < error < 0.1 for error in report.layers["error"])
    assert "in the format of compressed-tensors" in report.summary[0]
    assert getattr(model.config, "quantization_config", None) is None


def test_compensation_loses_less_than_statistics_and_these_less_than_nothing(tmp_path):
    inputs = batches(llama())
    losses = []
    for number, given in enumerate(("batches", "statistics", None)):
        model = llama()
        with torch.no_grad():
            before = model(**inputs[0]).logits
        more = {"batches": inputs} if given == "batches" else {}
        more |= {"statistics": collect_statistics(model, inputs)} if given == "statistics" else {}
        report = export(model, tmp_path / str(number), bits=3.5, **more)
        assert any("no calibration dataset" in note for note in report.notes) == (given is None)
        with torch.no_grad():
            losses.append(float((model(**inputs[0]).logits - before).square().sum()))
    assert losses[0] < losses[1] and losses[0] < losses[2]


def test_resumes_from_finished_layers(tmp_path):
    model, inputs = llama(), batches(llama())
    more = {"bits": 3.7, "batches": inputs, "journal": tmp_path / "journal"}
    export(model, tmp_path / "one", **more)
    (last,) = (tmp_path / "journal").glob("*-00002.safetensors")
    last.unlink()
    export(llama(), tmp_path / "two", **more)
    export(llama(), tmp_path / "three", **more)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def test_layers_that_share_keys_and_values(tmp_path):
    """The whole model runs for each layer, and the report says so."""
    model = tiny_architecture("gemma3n_text")
    report = export(model, tmp_path, bits=4, batches=[{"input_ids": torch.arange(3, 35).view(2, 16)}])
    assert any(note.startswith("the whole model was run for each layer") for note in report.notes)
    assert set(report.results["module_bits"].values()) <= {2, 3, 4} and all(e > 0 for e in report.layers["error"])


def test_bad_input(tmp_path):
    model = llama()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match=r"^output: expected a new directory, an empty one"):
        export(model, tmp_path / "full")
    with pytest.raises(ValueError, match=r"^model: expected a loaded transformers model, got Sequential"):
        export(nn.Sequential(model), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^model: expected plain .*weights, got weights stored by hf-cod"):
        packed = build("llama", hidden_size=64, intermediate_size=128)
        quantize(packed, bits=4)
        export(packed, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^to: expected one of compressed-tensors, .*, got 'tensorrt'"):
        export(model, tmp_path / "out", to="tensorrt")
    with pytest.raises(ValueError, match=r"^group_size: expected 128, 64, 32, got 48"):
        export(model, tmp_path / "out", group_size=48)
    with pytest.raises(ValueError, match=r"^bits: expected stored bits per weight, such as 3\.6, got nan"):
        export(model, tmp_path / "out", bits=float("nan"))
    with pytest.raises(ValueError, match=r"^statistics: expected those of LlamaForCausalLM"):
        export(model, tmp_path / "out", statistics=collect_statistics(llama(2), batches(llama(2))))
    with pytest.raises(ValueError, match=r"^weights: expected finite numbers, got NaN or infinity in model\.layers\.1"):
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        export(model, tmp_path / "out")
    assert len(find_decoder_layers(model)) == 3 and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_three_bits_of_a_real_model_require_compensation(smollm2, brown_text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    samples = token_batches(tokenizer, brown_text, max_samples=12, sequence_length=256, batch_size=4)
    calibration, held_out = split_samples(samples, 8)
    found = {}
    for name, given in (("nearest", None), ("compensated", calibration)):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        export(model, tmp_path / name, bits=3.25, batches=given)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        found[name] = perplexity(loaded, held_out)
    assert found["compensated"] < 0.6 * found["nearest"]
