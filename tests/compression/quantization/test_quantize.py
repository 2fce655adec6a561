import sys

import peft
import pytest
import torch

from hf_cod import OwlBnbConfig, collect_statistics, perplexity, quantize
from tests.compression.quantization.matrices import llama, mixed
from tests.compression.quantization.test_quantizer import outputs, stored
from tests.tiny_models import batch_for, build


def test_compensation_loses_least():
    batches = [batch_for(llama())]
    lost = {}
    for kind in ("nearest", "compensated"):
        model = llama()
        report = quantize(model, OwlBnbConfig(bits=3), batches=batches if kind == "compensated" else None)
        assert len(report.layers["bits"]) == 4 and report.results["module_bits"].keys() == stored(model).keys()
        lost[kind] = float((outputs(model) - outputs(llama())).norm())
        assert ("error" in report.layers) == (kind == "compensated")
    assert all(0 < error < 0.2 for error in report.layers["error"])
    assert lost["compensated"] < lost["nearest"]


@pytest.mark.parametrize("killed", [0, 1, 3])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_killed_run_goes_on_where_it_stopped(calibrated, killed, tmp_path, monkeypatch):
    batches = [batch_for(llama())] if calibrated else None
    whole = llama()
    quantize(whole, OwlBnbConfig(bits=3.6), batches=batches)
    change = sys.modules["hf_cod.compression.quantization.quantize"]._LayerChange
    call, calls = change.__call__, []

    def dying(self, index, sums):
        if index == killed:
            raise KeyboardInterrupt
        calls.append(index)
        return call(self, index, sums)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(change, "__call__", dying)
        quantize(llama(), OwlBnbConfig(bits=3.6), batches=batches, journal=tmp_path)
    assert calls == list(range(killed)) and len([*tmp_path.glob("*-0000?.safetensors")]) == killed
    resumed = llama()
    monkeypatch.setattr(change, "__call__", lambda self, index, sums: calls.append(index) or call(self, index, sums))
    report = quantize(resumed, OwlBnbConfig(bits=3.6), batches=batches, journal=tmp_path)
    assert calls == [0, 1, 2, 3]
    assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in whole.state_dict().items())
    assert torch.equal(outputs(resumed), outputs(whole)) and len(report.layers["bits"]) == 4
    other = llama()
    quantize(other, OwlBnbConfig(bits=3), batches=batches, journal=tmp_path)  # other work
    assert {m.bits for m in stored(other).values()} == {3}


def test_statistics_change_the_scales_alone():
    model, plain = llama(), llama()
    statistics = collect_statistics(model, [batch_for(model)])
    quantize(model, OwlBnbConfig(bits=3, statistics=statistics))
    quantize(plain, OwlBnbConfig(bits=3))
    lost = [float((outputs(m) - outputs(llama())).norm()) for m in (model, plain)]
    assert lost[0] != lost[1]
    with pytest.raises(ValueError, match="statistics: expected batches or statistics, got both"):
        quantize(llama(), OwlBnbConfig(statistics=statistics), batches=[batch_for(model)])
    with pytest.raises(ValueError, match="statistics: expected those of OPTForCausalLM"):
        quantize(build("opt"), OwlBnbConfig(bits=3, statistics=statistics))


def test_matrices_that_no_token_enters_are_noted():
    model = build("deepseek_v3")
    layer = model.model.layers[1].mlp
    layer.spare = torch.nn.Linear(32, 48)
    report = quantize(model, OwlBnbConfig(bits=3), batches=[batch_for(model)])
    assert "no token entered model.layers.1.mlp.spare: rounded to nearest" in report.notes
    assert "model.layers.1.mlp.spare" in stored(model)


def test_what_cannot_be_quantized_is_refused_before_anything_changes():
    adapted = llama()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), adapted)
    offloaded, shared, broken = llama(), llama(), llama()
    offloaded.model.layers[1].mlp.up_proj.to("meta")
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    broken.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("inf")
    for model, message in (
        (adapted, "model: expected plain weights, got an adapter"),
        (mixed(), "model: expected dense weights, got quantized ones"),
        (offloaded, "model: expected weights in memory, got offloaded ones"),
        (shared, "model: expected a separate weight for each matrix"),
        (broken, "weights: expected finite numbers, got NaN or infinity in model.layers.3.mlp.up_proj"),
        (llama().model.layers, "model: expected a loaded transformers model, got ModuleList"),
    ):
        count = sum(hasattr(m, "scales") for m in model.modules())
        with pytest.raises(ValueError, match=message):
            quantize(model, OwlBnbConfig(bits=3))
        assert sum(hasattr(m, "scales") for m in model.modules()) == count


@pytest.mark.slow
def test_real_text_ranks_the_ways_to_round(smollm2, brown_text):
    """At 3 bits in all layers: nearest is far worse than weighted scales, these than compensation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(brown_text[:60_000], return_tensors="pt").input_ids[0]
    batches = [{"input_ids": ids[i : i + 1024].view(4, 256)} for i in range(0, 8192, 1024)]
    train, held = batches[:4], batches[6:]

    def load():
        return AutoModelForCausalLM.from_pretrained(smollm2).eval()

    found = {"dense": perplexity(load(), held)}
    statistics = collect_statistics(load(), train)
    for name, config, text in (
        ("nearest", OwlBnbConfig(bits=3), None),
        ("weighted", OwlBnbConfig(bits=3, statistics=statistics), None),
        ("compensated", OwlBnbConfig(bits=3), train),
    ):
        model = load()
        quantize(model, config, batches=text)
        found[name] = perplexity(model, held)
    assert found["dense"] < found["compensated"] < 0.9 * found["weighted"] < 0.7 * found["nearest"], found
