"""Layers that the base model does not run on the model's inputs, and stacks without a name."""

import torch
from transformers import TimesFmConfig, TimesFmModelForPrediction

from hf_cod import find_decoder_layers, prune, score_layers
from tests.tiny_models import vit_mae


def test_a_base_that_requires_what_its_head_makes_is_not_run_alone():
    """TimesFM's forward pads the series for its base model, which requires the padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 3}
    series = {"patch_length": 8, "context_length": 32, "horizon_length": 8, "num_attention_heads": 4}
    model = TimesFmModelForPrediction(TimesFmConfig(**sizes, **series)).eval()
    batch = {"past_values": torch.randn(3, 32), "future_values": torch.randn(3, 8)}
    assert find_decoder_layers(model).trunk is model
    assert len(score_layers(model, method="owl", batches=[batch]).values) == 3
    prune(model, 0.5, batches=[batch])
    assert float((model.decoder.layers[0].mlp.gate_proj.weight == 0).float().mean()) > 0.3


def test_a_stack_outside_of_the_base_is_noted_and_can_be_chosen():
    """ViT-MAE's decoder: the config counts both stacks, and neither has a name."""
    model = vit_mae()
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}]
    path = "decoder.decoder_layers"
    report = prune(model, 0.5, batches=batches)
    assert report.notes == [f"the 2 layers of {path} are not pruned; stack='{path}' names them"]
    assert not any((p == 0).any() for p in model.decoder.decoder_layers.parameters() if p.dim() == 2)
    seen = []
    handle = model.decoder.decoder_layers[0].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    x, y = (state[:, -1].double() for state in seen[0])
    angle = torch.nn.functional.cosine_similarity(x, y).arccos().mean() / torch.pi
    found = score_layers(model, method="angular", batches=batches, layers_path=path).values
    assert abs(found[0] - float(angle)) < 1e-6
    report = prune(model, 0.5, batches=batches, layers_path=path)
    assert report.notes == ["the 3 layers of vit.layers are not pruned; stack='vit.layers' names them"]
    assert (model.decoder.decoder_layers[1].mlp.fc1.weight == 0).float().mean() > 0.3
