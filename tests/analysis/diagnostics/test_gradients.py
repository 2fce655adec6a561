import math

import pytest
import torch
from accelerate import disk_offload

from hf_cod import diagnose, find_decoder_layers, score_layers
from hf_cod.analysis.diagnostics.gradients import measure_gradient_norm
from tests.tiny_models import CAUSAL, batch_for, build, vit_mae


def reference(model, batches):
    """Plain autograd on the mean next-token loss of each batch; norms averaged over batches."""
    totals = [0.0] * len(find_decoder_layers(model))
    for batch in batches:
        model.zero_grad()
        logits = model(**batch).logits.double()
        losses = []
        for s in range(len(logits)):
            for t in range(logits.shape[1] - 1):
                if batch["attention_mask"][s, t + 1]:
                    losses.append(-logits[s, t].log_softmax(-1)[batch["input_ids"][s, t + 1]])
        (sum(losses) / len(losses)).backward()
        for i, layer in enumerate(find_decoder_layers(model)):
            squares = [float(p.grad.double().square().sum()) for p in layer.parameters() if p.grad is not None]
            totals[i] += math.sqrt(sum(squares))
    model.zero_grad()
    return [total / len(batches) for total in totals]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_against_autograd(family, padding):
    model = build(family)
    batches = [batch_for(model, padding), {k: v[:1] for k, v in batch_for(model).items()}]
    assert measure_gradient_norm(model, batches) == pytest.approx(reference(model, batches), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_float64_against_autograd(family):
    model = build(family, dtype=torch.float64)
    batch = batch_for(model, "left")
    assert measure_gradient_norm(model, [batch]) == pytest.approx(reference(model, [batch]), rel=1e-12)


def test_labels_of_another_head():
    model = build("vit")
    batch = {**batch_for(model), "labels": torch.tensor([0, 1, 2])}
    found = measure_gradient_norm(model, [batch])
    model(**batch).loss.backward()
    squares = [sum(float(p.grad.square().sum()) for p in layer.parameters()) for layer in model.vit.layers]
    assert found == pytest.approx([math.sqrt(s) for s in squares], rel=1e-5)


def test_masked_language_model():
    model = build("bert")
    batch = batch_for(model)
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(3, 9) > 0.3, -100)
    found = measure_gradient_norm(model, [batch])
    model(**batch).loss.backward()
    layers = find_decoder_layers(model)
    squares = [sum(float(p.grad.square().sum()) for p in layer.parameters()) for layer in layers]
    assert found == pytest.approx([math.sqrt(s) for s in squares], rel=1e-5)


def test_nothing_of_the_users_gradients_is_touched():
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    batch = batch_for(model)
    model(**batch).logits.sum().backward()
    before = [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    measure_gradient_norm(model, [batch])
    for p, (required, grad, value) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == required and p.grad is grad
        assert grad is None or torch.equal(grad, value)
        assert not p._post_accumulate_grad_hooks


def test_one_layer_and_bfloat16():
    model = build("llama", layers=1, dtype=torch.bfloat16)
    batch = batch_for(model)
    wide = build("llama", layers=1)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    found = measure_gradient_norm(model, [batch])
    assert found == pytest.approx(reference(model, [batch]), rel=1e-4), "the same bfloat16 gradients, summed in float64"
    assert found == pytest.approx(measure_gradient_norm(wide, [batch]), rel=0.03), "their own rounding"


def test_a_batch_with_nothing_to_predict_does_not_count():
    model = build("llama")
    batch = batch_for(model)
    short = {"input_ids": batch["input_ids"][:, :1]}
    assert measure_gradient_norm(model, [batch, short]) == measure_gradient_norm(model, [batch])
    with pytest.raises(ValueError, match="at least one token to predict, got none"):
        measure_gradient_norm(model, [short])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="BertModel has no head"):
        measure_gradient_norm(build("bert_headless"), [])
    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"activations: expected finite numbers, .* first in the output of layer 1"):
        measure_gradient_norm(broken, [batch_for(broken)])
    offloaded = build("llama")
    disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        measure_gradient_norm(offloaded, [batch_for(offloaded)])


def test_models_that_make_a_loss_without_labels():
    """ViT-MAE makes its own targets; it hides patches at random, or by `noise`."""
    model = vit_mae()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}
    model(**batch).loss.backward()
    squares = [sum(float(p.grad.double().square().sum()) for p in layer.parameters()) for layer in model.vit.layers]
    model.zero_grad()
    assert measure_gradient_norm(model, [batch]) == pytest.approx([math.sqrt(each) for each in squares], rel=1e-4)
    assert "gradient_norm" in diagnose(model, batches=[batch], show_progress=False).layers
    hidden_at_random = [{"pixel_values": batch["pixel_values"]}]
    one, other = (score_layers(model, method="fisher", batches=hidden_at_random).values for _ in range(2))
    assert one == other


def test_batches_of_which_a_model_makes_no_loss():
    model = build("vit")
    with pytest.raises(ValueError, match="requires labels, or other inputs of which it makes a loss"):
        measure_gradient_norm(model, [{"pixel_values": batch_for(model)["pixel_values"]}])
