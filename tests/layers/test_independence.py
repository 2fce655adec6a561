import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, ViltConfig, ViltForQuestionAnswering

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import (
    diagnose,
    drop,
    factorize,
    find_decoder_layers,
    narrow,
    perplexity,
    plan_depth,
    prune,
    quantize,
    repeat,
    score_layers,
    skip,
)
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.compression.depth.repeat_probe import RepeatProbe
from hf_cod.layers.independence import check_independent, reads_several_states
from hf_cod.layers.task import task_of
from tests.references import wanda_mask
from tests.tiny_models import FAMILIES, batch_for, build

REASON = r"expected layers that depend on earlier ones only by what the layer before returns, got .*whose layer 3 does"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_common_families_run_alone(family):
    model = build(family)
    check_independent(find_decoder_layers(model), "layers")
    check_independent(find_decoder_layers(model), "layers", [batch_for(model)])


def test_layers_that_use_states_of_several_earlier_ones_are_refused():
    """Inkling 2 hands the states before every other layer to all later ones."""
    model, batches = build_type("inkling2_text"), [{"input_ids": torch.arange(3, 11)[None]}]
    with pytest.raises(ValueError, match=rf"^narrow: {REASON}"):
        narrow(model, 0.9, batches=batches)
    with pytest.raises(ValueError, match=rf"^layer_drop: {REASON}"):
        diagnose(model, batches=batches, metrics=["layer_drop"])
    report = diagnose(model, batches=batches, metrics=["angular_distance"])
    assert report.n_layers == 4


def test_a_model_that_reads_samples_in_pairs():
    """XLNet with `bi_data` has no hidden state for a single sample, such as the one that layers are tried on."""
    torch.manual_seed(0)
    config = tiny_config("xlnet")
    config.bi_data = True
    model = AutoModelForCausalLM.from_config(config).eval()
    batches = [{"input_ids": torch.arange(24).reshape(2, 12) + 5}]
    whole = [module.weight.detach().clone() for module in find_decoder_layers(model).linears(1).values()]
    with pytest.raises(ValueError, match=r"^narrow: .* layer 0 does not run alone .*is empty for one sample\)$"):
        narrow(model, 0.9, batches=batches)
    report = prune(model, 0.5, "wanda", batches=batches)
    assert any("is empty for one sample" in note for note in report.notes)
    for module, weight in zip(find_decoder_layers(model).linears(1).values(), whole, strict=True):
        assert torch.equal(module.weight, weight * (module.weight != 0)) and (module.weight == 0).any()


def sharing(kind="gemma3n_text"):
    """The last two layers use the keys and values of the first two."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.num_kv_shared_layers, config.layer_types = 2, ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # the scale of one stream is zero at first
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return model


# Its layers share keys and values, run several times, return two streams, or use states of several earlier ones.
DEPENDENT = {
    "gemma3n_text": sharing,
    "dory": lambda: build_type("dory"),
    "reformer": lambda: build_type("reformer"),
    "inkling2_text": lambda: build_type("inkling2_text"),
}


@pytest.mark.parametrize("make", DEPENDENT.values(), ids=DEPENDENT)
def test_the_whole_model_runs_for_each_layer_that_does_not_run_alone(make):
    """Wanda's zeros are those of all inputs of a matrix in the model whose earlier layers are pruned already."""
    model, batch = make(), {"input_ids": torch.arange(3, 19)[None]}
    naive = copy.deepcopy(model)
    report = prune(model, 0.5, "wanda", batches=[batch])
    assert [note for note in report.notes if note.startswith("the whole model was run for each layer: ")]
    found, stack = find_decoder_layers(model), find_decoder_layers(naive)
    for index in range(len(stack)):
        squares = sums_of_squares(naive, stack.linears(index), batch)
        assert squares
        for name, total in squares.items():
            W = stack.linears(index)[name].weight.detach()
            assert torch.equal(found.linears(index)[name].weight == 0, wanda_mask(W, total.sqrt(), 0.5)), name
        stack[index].load_state_dict(found[index].state_dict())


def sums_of_squares(model, linears, batch):
    """Name -> sum of squares of each input channel, over all calls of a matrix."""
    found = {}

    def hook(name):
        def read(_, args, kwargs):
            x = [*args, *kwargs.values()][0].detach().flatten(0, -2)
            found[name] = found.get(name, 0) + x.square().sum(0)

        return read

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in linears.items()]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda model, batches: quantize(model, bits=4, batches=batches),
        lambda model, batches: factorize(model, 0.9, "whitened", batches=batches),
    ],
    ids=["quantize", "whitened"],
)
def test_methods_with_products_of_inputs_on_layers_that_share_keys_and_values(change):
    model, batches = sharing(), [{"input_ids": torch.arange(3, 19)[None]}]
    report = change(model, batches)
    assert [note for note in report.notes if "num_kv_shared_layers" in note]
    assert all(error is not None and 0 <= error < 0.5 for error in report.layers["error"])


def test_layers_that_share_keys_and_values_are_refused():
    with pytest.raises(ValueError, match=r"^narrow: expected layers with their own keys and values"):
        check_independent(find_decoder_layers(sharing()), "narrow")


def test_a_second_state_that_layers_hand_on_is_that_of_the_layer_before():
    """The router of Zaya mixes its state with that of the layer before."""
    model, batch = build_type("zaya"), {"input_ids": torch.arange(3, 11)[None]}
    batch["labels"] = batch["input_ids"]
    report = diagnose(model, batches=[batch], metrics=["layer_drop"])
    for layer, value in enumerate(report.results["layer_drop"]["without"]):
        with torch.no_grad(), skip(model, layer):
            assert math.log(value) == pytest.approx(float(model(**batch).loss), abs=1e-5), layer


def reader():
    """LLaVA, whose text gets the states before the last layer of its vision tower, and texts with an image each."""
    model = build_type("vision-language/llava+images")
    model.config.vision_feature_layer, token = -2, model.config.image_token_id
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels[:1], vision_feature_layer=-2)
    places = [token] * sum(len(each) for each in found.pooler_output)
    ids = torch.tensor([[3 + i, 4, *places, 5, 6 + i, 7] for i in range(4)])
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": ids.masked_fill(ids == token, -100)}


def test_removals_of_a_tower_whose_earlier_states_are_read_are_those_of_drop():
    """So the last layer costs nothing; repetitions are those of `repeated`."""
    model, batch = reader()
    intact = math.log(perplexity(model, [batch]))

    def loss(change, *where):
        other = copy.deepcopy(model)
        change(other, *where, stack="vision")
        return math.log(perplexity(other, [batch]))

    expected = [loss(drop, [layer]) - intact for layer in range(4)]
    assert expected[3] == 0 and all(abs(cost) > 1e-5 for cost in expected[:3])
    plan = plan_depth(model, 1, "layer_drop", batches=[batch], stack="vision", protect=False)
    assert plan.costs == pytest.approx(expected, abs=1e-7)
    (pair,) = _probe(RemovalProbe, model, batch).losses([[1, 2]])
    assert pair == pytest.approx(loss(drop, [1, 2]), abs=1e-7)
    report = diagnose(model, batches=[batch], metrics=["layer_drop"], stack="vision", show_progress=False)
    found = report.results["layer_drop"]
    assert [math.log(value) - math.log(found["intact"]) for value in found["without"]] == pytest.approx(
        expected, abs=1e-6
    )
    assert _probe(RepeatProbe, model, batch, 2).losses([(1, 3)]) == pytest.approx([loss(repeat, 1, 3)], abs=1e-7)


def test_measures_that_start_in_the_middle_refuse_a_model_that_reads_earlier_states():
    model, batch = reader()
    with pytest.raises(ValueError, match=r"^auto: expected a model that reads the hidden state after the last of its"):
        score_layers(model, method="auto", batches=[batch], stack="vision", pruner="magnitude", target=0.5)
    assert not reads_several_states(find_decoder_layers(model, "text"), [batch])


def _probe(kind, model, batch, *more):
    stack = find_decoder_layers(model, "vision")
    return kind(stack, find_metric(None, task_of(model, [batch])), *more, [batch])


def test_models_that_draw_random_numbers_are_named_as_such():
    """ViLT chooses patches at random in each forward pass."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViltForQuestionAnswering(ViltConfig(vocab_size=99, image_size=16, patch_size=4, **sizes)).eval()
    ids = torch.randint(5, 99, (2, 6))
    batch = {"input_ids": ids, "token_type_ids": ids * 0, "pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"layer_drop: .*\(the model draws random numbers in eval mode"):
        score_layers(model, method="layer_drop", batches=[batch])
