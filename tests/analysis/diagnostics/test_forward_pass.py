import itertools

import pytest
import torch
from accelerate import disk_offload
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import collect_statistics, diagnose, find_decoder_layers, perplexity, plan_ranks, skip
from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.layers.streams import check_states
from tests import references
from tests.tiny_models import FAMILIES, batch_for, build


def check_formulas(model, batch, token="last", tolerance=1e-6):
    """All forward measures of one batch against the formulas."""
    found = measure_forward(model, [batch], token=token)
    mask = batch.get("attention_mask")
    states = references.hidden_states(model, batch)
    torch.testing.assert_close(
        found.angular_distance(), references.angular_matrix(states, mask, token), atol=tolerance, rtol=0, equal_nan=True
    )
    expected = torch.tensor(references.block_influence(states, mask), dtype=torch.float64)
    torch.testing.assert_close(found.influence.double().mean(0), expected, atol=tolerance, rtol=0)
    variance = found.output_variance()
    for i, (x, y) in enumerate(itertools.pairwise(states)):
        tokens = references.real_tokens(y, mask)
        update = references.real_tokens(y - x, mask)
        assert variance["variance"][i] == pytest.approx(float(tokens.var(correction=0)), rel=tolerance)
        assert variance["mean"][i] == pytest.approx(float(tokens.mean()), abs=tolerance)
        assert variance["max_abs"][i] == pytest.approx(float(tokens.abs().max()), rel=tolerance)
        share = float(update.var(correction=0) / tokens.var(correction=0))
        assert variance["added_share"][i] == pytest.approx(share, rel=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_the_formulas(family):
    model = build(family)
    check_formulas(model, batch_for(model))


@pytest.mark.parametrize("token", ["last", "first", "all"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_is_ignored(family, padding, token):
    model = build(family)
    check_formulas(model, batch_for(model, padding), token)


def test_bfloat16():
    model = build("llama", dtype=torch.bfloat16)
    check_formulas(model, batch_for(model, "right"))


def test_one_layer():
    model = build("llama", layers=1)
    check_formulas(model, batch_for(model))


def test_batches_of_unequal_size_count_by_sample():
    model = build("llama")
    batch = batch_for(model)
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    whole, split = measure_forward(model, [batch]), measure_forward(model, parts)
    torch.testing.assert_close(whole.angular_distance(), split.angular_distance(), equal_nan=True, atol=1e-7, rtol=0)
    torch.testing.assert_close(whole.outputs, split.outputs, atol=1e-5, rtol=1e-6)


def test_the_last_state_is_in_front_of_the_final_norm():
    model = build("llama")
    batch = batch_for(model)
    with torch.no_grad():
        shown = model(**batch, output_hidden_states=True).hidden_states[-1]
    expected = float(references.hidden_states(model, batch)[-1].var(correction=0))
    assert measure_forward(model, [batch]).output_variance()["variance"][-1] == pytest.approx(expected, rel=1e-6)
    assert abs(float(shown.var(correction=0)) - expected) > 1e-3, "transformers' own last state is another one"


def test_offloaded_to_disk(tmp_path):
    model = build("llama")
    batch = batch_for(model)
    expected = measure_forward(model, [batch])
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in model.parameters())
    found = measure_forward(model, [batch])
    torch.testing.assert_close(found.distances, expected.distances, atol=0, rtol=0)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(ValueError, match="got a model on the meta device"):
        measure_forward(model, [batch_for(model)])


def test_broken_activations_name_the_first_layer():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    for metrics in (["angular_distance"], ["output_variance"]):
        with pytest.raises(ValueError, match="first in the output of layer 2, batch 0"):
            measure_forward(model, [batch_for(model)], metrics)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    measure_forward(model, [batch_for(model)])
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_bad_settings():
    model = build("llama")
    with pytest.raises(ValueError, match="token: expected 'last', 'first' or 'all', got 'middle'"):
        measure_forward(model, [batch_for(model)], token="middle")
    with pytest.raises(ValueError, match="metrics: expected some of"):
        measure_forward(model, [batch_for(model)], ["speed"])


def test_hidden_states_with_tokens_first():
    config = CONFIG_MAPPING["xlnet"](vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = AutoModel.from_config(config).eval()
    batch = batch_for(model, "left")
    found = measure_forward(model, [batch])
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states  # samples first
    for sample in range(3):
        expected = references.angle(states[0][sample, -1].double(), states[1][sample, -1].double())
        assert float(found.distances[sample, 0, 1]) == pytest.approx(float(expected), abs=1e-5)


IDS = torch.randint(5, 80, (3, 9), generator=torch.Generator().manual_seed(1))
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 9, [1] * 9, [1] * 7 + [0] * 2])}


def angles_by_hooks(model, batch, merge):
    """Angle of each layer at the last real token, and the layers that ran."""
    found, last = {}, batch["attention_mask"].sum(-1) - 1

    def hook_of(index):
        def hook(module, args, kwargs, out):
            x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            x, y = (merge(state.double())[torch.arange(len(last)), last] for state in (x, y))
            cosine = torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
            found[index] = float((cosine.arccos() / torch.pi).mean())

        return hook

    stack = find_decoder_layers(model)
    handles = [layer.register_forward_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(stack)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "merge"),
    [
        ("deepseek_v4", lambda x: x.flatten(2)),  # (samples, tokens, streams, width)
        ("gemma3n_text", lambda x: torch.cat([*x], -1)),  # (streams, samples, tokens, width)
    ],
)
def test_all_streams_of_a_token_are_one_vector(kind, merge):
    model = build_type(kind)
    expected = angles_by_hooks(model, PADDED, merge)
    found = measure_forward(model, [PADDED])
    torch.testing.assert_close(found.angular_distance()[:, 0].tolist(), [*expected.values()], atol=1e-6, rtol=1e-5)
    assert found.not_run == () and not found.influence.isnan().any()


@pytest.mark.parametrize("idle", [0, 1, 3])
def test_layers_that_do_not_run_are_reported_and_shift_nothing(idle):
    config = tiny_config("mllama")
    config.text_config.cross_attention_layers = [idle]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = angles_by_hooks(model, PADDED, lambda x: x)
    assert [*expected] == [i for i in range(4) if i != idle]
    report = diagnose(model, batches=[PADDED], metrics=["angular_distance", "layer_drop"], show_progress=False)
    assert report.results["not_run"] == [idle] and f"layer {idle} did not run on these inputs" in report.notes
    found = report.layers["angular_distance"]
    torch.testing.assert_close(found, [expected.get(i) for i in range(4)], atol=1e-6, rtol=1e-5)
    intact = perplexity(model, [PADDED])
    for index, drop in enumerate(report.layers["layer_drop"]):
        with skip(model, index):
            assert drop == pytest.approx(perplexity(model, [PADDED]) - intact, rel=1e-3, abs=1e-3)


def test_tokens_that_a_model_adds_itself():
    model = build_type("cpmant")
    found = measure_forward(model, [{"input_ids": IDS}])
    assert found.angular_distance()[:, 0].min() > 0
    for batch, token in ((PADDED, "last"), ({"input_ids": IDS}, "first")):
        with pytest.raises(
            ValueError, match=r"^model: expected hidden states of the 9 tokens .* CpmAnt.* adds or drops"
        ):
            measure_forward(model, [batch], token=token)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, batches: measure_forward(model, batches, layers_path="vision"),
        lambda model, batches: collect_statistics(model, batches, layers_path="vision"),
        lambda model, batches: plan_ranks(model, 0.8, "fisher", batches=batches, layers_path="vision"),
    ],
)
def test_layers_of_which_none_run_are_refused(measure):
    with pytest.raises(
        ValueError,
        match=r"^batches: expected inputs on which the layers of .*vision.* run, got others.*; layers that read images",
    ):
        measure(build_tower(), [{"input_ids": IDS}])


def build_tower():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    images = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    words = {"model_type": "llama", **sizes, "vocab_size": 99}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=words)).eval()


@pytest.mark.parametrize("token", ["last", "all"])
def test_packed_patches_are_one_sample(token):
    """Qwen2.5-VL reads the patches of all images in one row; two images of 4 x 4 patches give 4 tokens each."""
    torch.manual_seed(0)
    model = build_type("vision-language/qwen2_5_vl")
    ids = torch.tensor([[5, model.config.image_token_id, 7]] * 2).repeat_interleave(torch.tensor([1, 4, 1]), 1)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        "pixel_values": torch.randn(32, 384),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    states = []
    layers = model.model.visual.blocks
    handles = [layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    handles += [layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    assert len(states) == 5 and {tuple(x.shape) for x in states} == {(32, 32)}
    packed = [x[None] for x in states]
    found = measure_forward(model, [batch], token=token, layers_path="vision")
    expected = references.angular_matrix(packed, None, token)
    torch.testing.assert_close(found.angular_distance(), expected, atol=1e-6, rtol=0, equal_nan=True)
    influence = torch.tensor(references.block_influence(packed, None), dtype=torch.float64)
    torch.testing.assert_close(found.influence[0].double(), influence, atol=1e-6, rtol=0)
    assert found.output_variance()["variance"] == pytest.approx(
        [float(x.var(correction=0)) for x in states[1:]], rel=1e-6
    )
    report = diagnose(model, batches=[batch], stack="vision", show_progress=False)
    with skip(model, 1, "vision"):
        assert report.results["layer_drop"]["without"][1] == pytest.approx(perplexity(model, [batch]), rel=1e-5)


def test_samples_of_patches_and_what_is_refused():
    """Three samples: tiles of images are samples of the layers, tokens before samples are not."""
    stack = find_decoder_layers(build("vit"))
    for shape, tokens, fits in [
        ((1, 48, 8), None, True),
        ((6, 5, 8), None, True),
        ((6, 3, 8), None, False),
        ((5, 4, 8), None, False),
        ((1, 48, 8), 16, False),
        ((3, 5, 8), 5, True),
    ]:
        x = torch.zeros(shape)
        if fits:
            check_states(stack, 0, x, x, 3, tokens)
        else:
            with pytest.raises(ValueError, match=r"expected hidden states \(samples, tokens, width\) of 3 samples"):
                check_states(stack, 0, x, x, 3, tokens)
