"""PEFT on top of mixed layers."""

import copy

import peft
import pytest
import torch

from hf_cod import collect_statistics, prune, score_layers
from tests.compression.quantization.matrices import mixed
from tests.compression.quantization.test_quantizer import outputs
from tests.tiny_models import batch_for


def adapted(model, **options):
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def pair(family="llama", **options):
    """Adapters on a mixed model that already computed something, and the same ones on what it decodes to."""
    model = mixed(family)
    outputs(model)
    dense = copy.deepcopy(model).dequantize()
    return adapted(model, **options), adapted(dense, **options)


def gradients(model):
    batch = batch_for(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_adapters_learn_as_they_would_beside_dense_matrices(family):
    model, dense = pair(family)
    torch.testing.assert_close(outputs(model), outputs(dense), atol=1e-4, rtol=1e-4)
    mine, theirs = gradients(model), gradients(dense)
    assert mine and mine.keys() == theirs.keys() and all("lora" in name for name in mine)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_preparation_for_training_and_a_step():
    model = mixed()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model = peft.prepare_model_for_kbit_training(model)
    model = adapted(model, init_lora_weights=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = batch_for(model)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    after = {key.replace(".base_layer", ""): t for key, t in model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_adapters_are_saved_and_loaded_again(tmp_path):
    model, dense = pair()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mixed(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    expected = outputs(dense)
    with pytest.raises(ValueError, match="model: expected no adapters on 4-bit layers"):
        loaded.base_model.model.dequantize()
    assert torch.equal(outputs(loaded), outputs(model))
    loaded = peft.PeftModel.from_pretrained(mixed().dequantize(), tmp_path)
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_three_bits_do_not_merge_and_say_so(safe):
    model, _ = pair()
    with pytest.raises(ValueError, match=r"weight: expected no arithmetic with codes .* model.dequantize\(\)"):
        model.merge_and_unload(safe_merge=safe)
    model, _ = pair()
    before = outputs(model)
    with pytest.raises(ValueError, match=r"weight: expected no arithmetic"):
        model.base_model.model.model.layers[1].mlp.up_proj.merge(safe_merge=safe)
    assert torch.equal(outputs(model), before)


def test_four_bits_merge_as_those_of_bitsandbytes_do(tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model, _ = pair(target_modules=["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    merged = layer.base_layer.unpack() + layer.get_delta_weight("default")
    codes, state = quantize_4bit(merged, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = dequantize_4bit(codes, state)
    plain = model.merge_and_unload()
    found = plain.model.layers[0].mlp.up_proj
    torch.testing.assert_close(found.unpack(), expected, atol=1e-6, rtol=1e-5)
    after = outputs(plain)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), after)
    torch.testing.assert_close(outputs(plain.to("cpu")), after, atol=0, rtol=0)


def test_dora_is_refused_on_three_bits():
    with pytest.raises(ValueError, match=r"weight: expected no arithmetic with codes .*DoRA"):
        adapted(mixed(), use_dora=True)


def test_scores_and_statistics_of_a_mixed_model():
    model = mixed()
    dense = copy.deepcopy(model).dequantize()
    found, expected = (collect_statistics(m, [batch_for(m)]) for m in (model, dense))
    assert found.squares.keys() == expected.squares.keys()
    for name, squares in expected.squares.items():
        torch.testing.assert_close(found.squares[name], squares, atol=1e-4, rtol=1e-4)
    mine, theirs = score_layers(model, found, threshold=3.0), score_layers(dense, expected, threshold=3.0)
    assert mine.values == pytest.approx(theirs.values, rel=1e-3) and mine.parameters == theirs.parameters
    with pytest.raises(ValueError, match=r"model: expected plain floating-point weights, got .* use the model"):
        prune(model, 0.5, "magnitude")
