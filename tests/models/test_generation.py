import pytest
import torch

from hf_cod.models import PLACEMENTS

from .tiny import LLAMA_CASES, TEXT_CASES, inputs, tiny_model, tokens

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.mark.parametrize(("model_type", "placement"), TEXT_CASES)
def test_cached_and_uncached_generation_are_equal(model_type, placement):
    model, prompt = tiny_model(model_type, placement), tokens(2, 7)
    with_cache = model.generate(prompt, **GREEDY)
    without = model.generate(prompt, use_cache=False, **GREEDY)
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, without)
    # Logits too: tokens alone would hide small errors.
    whole = model(with_cache).logits
    past = model(with_cache[:, :8], use_cache=True).past_key_values
    step = model(with_cache[:, 8:9], past_key_values=past).logits
    assert (step[:, 0] - whole[:, 8]).abs().max() <= 1e-5


@pytest.mark.parametrize(("model_type", "placement"), [*LLAMA_CASES, ("cod_qwen3", "lns"), ("cod_mistral", "mix")])
def test_static_cache_generates_the_same(model_type, placement):
    model, prompt = tiny_model(model_type, placement), tokens(2, 7)
    config = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(prompt, **GREEDY, **config), model.generate(prompt, **GREEDY))


@pytest.mark.parametrize(("model_type", "placement"), TEXT_CASES)
def test_left_padding_changes_nothing(model_type, placement):
    model, prompt = tiny_model(model_type, placement), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
    mask = (padded != 0).long()
    together = torch.cat([padded, tokens(1, 8, seed=5)])
    masks = torch.cat([mask, torch.ones_like(mask)])
    alone = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(together, attention_mask=masks, **GREEDY)[0, 3:], alone[0])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position).logits[:, 3:]
    assert (logits - model(prompt).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@torch.no_grad()  # flex attention has no backward pass on a CPU
def test_attention_implementations_agree(placement, attention):
    model = tiny_model("cod_llama", placement)
    expected = model(tokens()).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(attention)
    assert (model(tokens()).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", ["cod_qwen2", "cod_qwen3", "cod_mistral", "cod_olmo", "cod_olmo2", "cod_vit"])
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree_in_every_family(model_type, attention):
    model = tiny_model(model_type, "sandwich")
    expected = model(**inputs(model_type)).logits
    model.set_attn_implementation(attention)
    assert (model(**inputs(model_type)).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", ["cod_llama", "cod_qwen2", "cod_olmo2", "cod_vit"])
def test_hidden_states_and_attentions_can_be_recorded(model_type):
    model = tiny_model(model_type, "sandwich", attn_implementation="eager")
    out = model(**inputs(model_type), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5
    assert len(out.attentions) == 4
    assert out.attentions[0].shape[:2] == (2, 4)


@pytest.mark.parametrize(
    ("placement", "fields"),
    [("lns", {}), ("mix", {}), ("deepnorm", {}), ("lns_output", {"gpas": True, "layer_scale": 0.5})],
    ids=str,
)
def test_compiled_as_one_graph(placement, fields):
    torch._dynamo.reset()
    model = tiny_model("cod_llama", placement, **fields)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(tokens(), use_cache=False).logits - model(tokens(), use_cache=False).logits).abs().max() <= 1e-5


def test_inductor_trains_like_eager():
    torch._dynamo.reset()
    model, batch = tiny_model("cod_llama", "lns", num_hidden_layers=2), tokens()
    model(batch, labels=batch, use_cache=False).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(batch, labels=batch, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad - expected[name]).abs().max() <= 1e-4, name


@pytest.mark.parametrize("placement", ["lns", "mix"])
def test_exported_with_dynamic_shapes(placement):
    model = tiny_model("cod_llama", placement)
    rows, length = torch.export.Dim("rows", min=2, max=8), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(2, 9), "use_cache": False},
        dynamic_shapes={"input_ids": {0: rows, 1: length}, "use_cache": None},
    )
    other = tokens(3, 5)
    got = program.module()(input_ids=other, use_cache=False).logits
    assert (got - model(other).logits).abs().max() <= 1e-5
