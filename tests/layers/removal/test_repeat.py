import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import build as build_type
from hf_cod import drop, find_decoder_layers, quantize, repeat, repeated, skip
from hf_cod.layers.removal.repeat import check_repeat
from hf_cod.models import PLACEMENTS, CodLlamaConfig, CodLlamaForCausalLM
from tests.fresh_processes import run_fresh
from tests.layers.removal.references import with_block
from tests.layers.removal.test_drop import output, snapshot
from tests.tiny_models import CAUSAL, DEFAULT_FAMILIES, FAMILIES, batch_for, build, build_encoder_decoder, seq2seq_batch

# Kinds of which something outside of the layers, or between them, depends on their number or index.
SPECIAL = {
    "gemma3n_text": (1, 2),  # a table with a block for each layer, and layers that use the keys of others
    "gemma4_text": (1, 3),  # overrides by layer
    "jamba": (0, 2),  # a period of kinds of layers
    "recurrent_gemma": (1, 3),  # a pattern of kinds, written out
    "dory": (1, 2),  # layers that run several times
    "minicpm3": (1, 3),  # a number that is divided by the depth
    "gpt_neox": (1, 3),
    "qwen3_5_text": (1, 2),
}


def expected_of(model, start, end, batch, **more):
    cacheless = {"use_cache": False} if model.can_generate() else {}
    return output(with_block(model, start, end, **more), {**batch, **cacheless})


def check_cached(model, ids):
    made = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "family", [f if f in DEFAULT_FAMILIES else pytest.param(f, marks=pytest.mark.families) for f in FAMILIES]
)
@pytest.mark.parametrize("block", [(1, 3), (0, 1), (0, 4)])
def test_repeat_is_the_block_in_a_loop_and_drop_of_the_copies_restores_the_model(family, block):
    start, end = block
    model = build(family, first_k_dense_replace=0) if family == "deepseek_v3" else build(family)
    batch, before = batch_for(model), snapshot(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = expected_of(model, start, end, batch)
    with repeated(model, start, end):
        assert torch.equal(output(model, batch), expected)
        assert len([*model.parameters()]) == len(before[2]), "weights were copied"
    assert snapshot(model) == before
    order = [*range(end), *range(start, end), *range(end, 4)]
    assert repeat(model, start, end) == order
    assert torch.equal(output(model, batch), expected)
    assert len({id(p) for p in model.parameters()}) == len({p.data_ptr() for p in model.parameters()})
    if family in CAUSAL:
        check_cached(model, batch["input_ids"])
    drop(model, range(end, 2 * end - start))
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_depends_on_the_number_of_layers_follows(kind, tmp_path):
    model, block = build_type(kind), SPECIAL[kind]
    batch = {"input_ids": torch.arange(3, 11)[None]}
    expected = expected_of(model, *block, batch, times=3)
    repeat(model, *block, times=3)
    assert torch.equal(output(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(loaded, batch), expected, atol=1e-6, rtol=1e-6)
    check_cached(loaded, batch["input_ids"])


@pytest.mark.process
@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_a_deeper_stock_checkpoint_loads_without_this_package(family, tmp_path):
    model = build(family)
    types = list(getattr(model.config, "layer_types", None) or [])
    batch = batch_for(model)
    expected = expected_of(model, 1, 4, batch)
    repeat(model, 1, 4)
    assert list(getattr(model.config, "layer_types", None) or []) == [*types, *types[1:]]
    model.save_pretrained(tmp_path / "model")
    torch.save({"ids": batch["input_ids"], "expected": expected}, tmp_path / "batch.pt")
    code = (
        "import sys, torch, transformers\n"
        "batch = torch.load(sys.argv[1] + '/batch.pt')\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "assert model.config.num_hidden_layers == len(model.model.layers) == 7\n"
        "found = model(batch['ids'], attention_mask=torch.ones_like(batch['ids'])).logits\n"
        "assert torch.equal(found, batch['expected'])\n"
        "how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)\n"
        "ids = [model.generate(batch['ids'], use_cache=cache, **how) for cache in (True, False)]\n"
        "assert torch.equal(*ids) and 'hf_cod' not in sys.modules\n"
    )
    done = run_fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_sides_of_an_encoder_decoder(kind, side, tmp_path):
    """Of T5's first layer, with the table of position biases, the copy has no table of its own."""
    model = build_encoder_decoder(kind)
    batch = seq2seq_batch(model)
    expected = output(with_block(model, 0, 2, layers_path=side), {**batch, "use_cache": False})
    repeat(model, 0, 2, stack=side)
    assert torch.equal(output(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert len(find_decoder_layers(loaded, stack=side)) == 6
    assert torch.equal(output(loaded, batch), expected)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = [loaded.generate(batch["input_ids"], use_cache=cache, **how) for cache in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_keeps_the_depth_of_its_layers(placement, tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = CodLlamaForCausalLM(CodLlamaConfig(**sizes, num_hidden_layers=4, norm_placement=placement)).eval()
    batch = batch_for(model)
    expected = expected_of(model, 1, 3, batch)
    repeat(model, 1, 3)
    assert model.config.layer_depths == [0, 1, 2, 1, 2, 3] and torch.equal(output(model, batch), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), batch), expected)


def test_copies_are_trained_on_their_own():
    model = build("llama")
    repeat(model, 1, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.zero_()
    assert model.model.layers[1].mlp.up_proj.weight.any()


def test_repeated_comes_back_after_an_exception_and_works_on_quantized_weights():
    model = build("llama", intermediate_size=64, hidden_size=64)
    quantize(model, bits=3)
    before, batch = copy.deepcopy(model.config.to_dict()), batch_for(model)
    expected = expected_of(model, 1, 3, batch)
    with pytest.raises(RuntimeError), repeated(model, 1, 3):
        assert torch.equal(output(model, batch), expected)
        raise RuntimeError("in the block")
    assert model.config.to_dict() == before and len(find_decoder_layers(model)) == 4
    with pytest.raises(ValueError, match=r"^model: expected plain floating-point weights, got weights stored by hf"):
        repeat(model, 1, 3)


@pytest.mark.parametrize(
    ("kind", "block", "reason"),
    [
        ("jamba", (1, 2), r"^layers: expected layers .* for layer_types, .*; repeat whole periods .* use repeated$"),
        ("zamba2", (1, 2), r"^layers: expected layers with weights of their own"),
        ("diffllama", (1, 2), "lambda_init"),
        ("rwkv", (1, 2), "^model: expected weights that stay the same"),
        ("vision-language/qwen3_vl", (0, 2), r"^layers: .* with the repeated layers it does by index"),
        (
            "seq2seq/prophetnet",
            (1, 2),
            "^layers: expected at most 4 layers in the decoder of ProphetNet.*, got 5; first ",
        ),
        ("gemma3n_text", (1, 3), "^layers: expected a config by which layers share keys and values as before"),
    ],
)
def test_what_cannot_be_said_is_refused_in_one_line_and_nothing_has_changed(kind, block, reason):
    model = build_type(kind)
    before = snapshot(model)
    for function in (check_repeat, repeat):
        with pytest.raises(ValueError, match=reason) as caught:
            function(model, *block)
        assert "\n" not in str(caught.value) and snapshot(model) == before


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((4, 5), "^start: expected 0..3, got 4$"),
        ((-1, 2), "^start: expected 0..3, got -1$"),
        ((1, 1), r"^end: expected more than start \(1\), up to 4, got 1$"),
        ((1, 5), r"^end: expected more than start \(1\), up to 4, got 5$"),
        ((1, 2, 1), "^times: expected at least 2, got 1$"),
    ],
)
def test_bad_blocks(block, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        repeat(model, *block)
    with pytest.raises(ValueError, match=message), repeated(model, *block):
        pass


def test_a_model_of_one_layer_and_a_repetition_of_a_repetition():
    model = build("llama", layers=1)
    batch = batch_for(model)
    expected = expected_of(model, 0, 1, batch, times=4)
    repeat(model, 0, 1)
    repeat(model, 0, 2)
    assert torch.equal(output(model, batch), expected)
    with skip(model, [1, 2, 3]), repeated(model, 0, 1, times=4):
        assert torch.equal(output(model, batch), expected)
