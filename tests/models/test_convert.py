import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_cod.models import PLACEMENTS, fold_lns, to_gpas, to_layer_scale, to_lns

from .tiny import BY_TYPE, TEXT, inputs, tiny_model, tokens

FOLDABLE = ("pre", "scaled_init", "lns", "lns_output")
LNS_TYPES = [name for name, family in BY_TYPE.items() if "lns" in family.config.valid_placements()]


def first(output) -> torch.Tensor:
    return next(value for value in output.to_tuple() if torch.is_tensor(value))


def gap(one, other, model_type) -> float:
    return (first(one(**inputs(model_type))) - first(other(**inputs(model_type)))).abs().max().item()


@pytest.mark.parametrize("placement", FOLDABLE)
@pytest.mark.parametrize("model_type", LNS_TYPES)
def test_folded_to_stock_with_equal_logits(model_type, placement):
    model = tiny_model(model_type, placement)
    before = copy.deepcopy(model.state_dict())
    stock = fold_lns(model)
    assert type(stock).__module__.startswith("transformers.models.")
    assert stock.config.model_type == model_type.removeprefix("cod_")
    assert not hasattr(stock.config, "norm_placement") and not hasattr(stock.config, "layer_depths")
    assert gap(model, stock, model_type) <= 1e-5
    # The model itself is left as it was, and shares nothing with the new one.
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for weight in stock.parameters():
        weight.data.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("model_type", LNS_TYPES)
def test_stock_to_lns_and_back(model_type):
    stock = fold_lns(tiny_model(model_type, "pre"))
    lns = to_lns(stock)
    assert lns.config.norm_placement == "lns" and lns.config.model_type == model_type
    assert gap(stock, lns, model_type) <= 1e-5
    back = fold_lns(lns)
    for name, weight in back.state_dict().items():
        assert torch.allclose(weight, stock.state_dict()[name], rtol=1e-6, atol=0), name


STARTS = {
    "lns_output": lambda model: to_lns(model, placement="lns_output"),
    "no exponent": lambda model: to_lns(model, exponent=0),
    "gpas": to_gpas,
    "layer_scale": to_layer_scale,
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("model_type", LNS_TYPES)
def test_a_start_with_the_function_of_stock_and_back(model_type, start):
    stock = fold_lns(tiny_model(model_type, "pre"))
    ours = STARTS[start](stock)
    assert ours.config.model_type == model_type
    assert gap(stock, ours, model_type) <= 1e-5
    back = fold_lns(ours)
    for name, weight in back.state_dict().items():
        assert torch.allclose(weight, stock.state_dict()[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("model_type", ["cod_llama", "cod_qwen2", "cod_vit"])
def test_layer_scale_and_exponent_are_folded(model_type):
    model = tiny_model(model_type, "lns_output", layer_scale=0.5, lns_exponent=0.8)
    assert model.base_model.layers[0].mlp_scale.weight.std() > 0.05
    assert gap(model, fold_lns(model), model_type) <= 1e-5


def test_gates_are_folded_only_where_they_are_0():
    model = tiny_model("cod_llama", "lns", gpas=True)
    with pytest.raises(ValueError, match=r"^gpas: expected gates of 0, got others, which cannot be folded: they scale"):
        fold_lns(model)


def test_starts_that_a_family_cannot_have():
    olmo = fold_lns(tiny_model("cod_olmo2", "reordered"))
    assert gap(olmo, to_gpas(olmo), "cod_olmo2") == 0.0
    with pytest.raises(ValueError, match=r"^layer_scale: expected None with norm_placement='reordered', got 1.0"):
        to_layer_scale(olmo)
    with pytest.raises(ValueError, match=r"^placement: expected one of lns, lns_output, got 'pre'"):
        to_lns(olmo, placement="pre")


def test_folding_goes_into_the_norms_of_deeper_layers_only():
    model = tiny_model("cod_llama", "lns")
    old, new = model.state_dict(), fold_lns(model).state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{i}.{n}_layernorm.weight" for i in (1, 2, 3) for n in ("input", "post_attention")}
    name = "model.layers.3.input_layernorm.weight"
    assert torch.equal(new[name], old[name] / 2)


def test_folding_changes_the_gradients_of_the_norms_alone():
    model = tiny_model("cod_llama", "lns")
    stock = fold_lns(model)
    for one in (model, stock):
        one(tokens()).logits.square().mean().backward()
    folded = dict(stock.named_parameters())
    for name, weight in model.named_parameters():
        factor = 1.0
        if "layernorm" in name:
            factor = math.sqrt(int(name.split(".")[2]) + 1)
        torch.testing.assert_close(folded[name].grad, factor * weight.grad, rtol=1e-4, atol=1e-6)


def test_folding_weightless_norms_goes_into_the_projections():
    model = tiny_model("cod_olmo", "lns", attention_bias=True, clip_qkv=0.5)
    assert any("bias" in name for name, _ in model.named_parameters())
    assert gap(model, fold_lns(model), "cod_olmo") <= 1e-5


def test_olmo2_is_stock_already():
    model = tiny_model("cod_olmo2", "reordered")
    stock = fold_lns(model)
    assert stock.config.model_type == "olmo2"
    assert gap(model, stock, "cod_olmo2") == 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "auto",
    [
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ],
    ids=lambda auto: auto.__name__,
)
def test_every_head_is_folded(auto, tied):
    model = tiny_model("cod_llama", "lns", auto, tie_word_embeddings=tied)
    stock = fold_lns(model)
    assert type(stock).__name__ == type(model).__name__.removeprefix("Cod")
    assert gap(model, stock, "cod_llama") <= 1e-5
    assert gap(to_lns(stock), stock, "cod_llama") <= 1e-5


def test_a_head_that_transformers_lacks():
    with pytest.raises(ValueError, match="expected a head that transformers has, got CodOlmoForQuestionAnswering"):
        fold_lns(tiny_model("cod_olmo", "lns", AutoModelForQuestionAnswering))


def test_bfloat16_differs_by_rounding_only():
    model = tiny_model("cod_llama", "lns").to(torch.bfloat16)
    stock = fold_lns(model)
    assert stock.dtype == torch.bfloat16
    expected = first(model(tokens())).float()
    assert (first(stock(tokens())).float() - expected).norm() <= 0.03 * expected.norm()


def test_a_stack_that_lost_layers_is_folded_by_its_old_depths():
    model = tiny_model("cod_llama", "lns")
    del model.model.layers[1]
    model.config.num_hidden_layers = 3
    stock = fold_lns(model)
    expected = model(tokens(), use_cache=False).logits
    assert (stock(tokens()).logits - expected).abs().max() <= 1e-5


WHY = {
    "post": "rescales the residual stream by a factor that depends on the input",
    "mix": "in the first layers its norm acts on the sum",
    "deepnorm": "rescales the residual stream by a factor that depends on the input",
    "sandwich": "it has four norms in a layer",
    "reordered": "its norm acts on the output of a sublayer",
}


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name not in FOLDABLE])
def test_the_others_say_why_they_cannot_be_folded(placement, tmp_path):
    model = tiny_model("cod_llama", placement)
    with pytest.raises(
        ValueError, match=f"expected one of pre, scaled_init, lns, lns_output, got '{placement}'.*{WHY[placement]}"
    ):
        fold_lns(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_foldable_placement_is_one_that_the_stock_family_has():
    with pytest.raises(ValueError, match="expected one of reordered, got 'sandwich'"):
        fold_lns(tiny_model("cod_olmo2", "sandwich"))


@pytest.mark.parametrize("model_type", ["cod_qwen2", "cod_qwen3"])
def test_alternating_sliding_windows_are_kept(model_type):
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    model = tiny_model(model_type, "lns", **windows)
    assert gap(model, fold_lns(model), model_type) <= 1e-5
    assert gap(model, tiny_model(model_type, "lns"), model_type) > 1e-3


def test_wrong_sources():
    with pytest.raises(ValueError, match=r"expected a model of type cod_llama, .*, got 'gpt2'"):
        fold_lns(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)))
    with pytest.raises(ValueError, match=r"expected a model of type llama, .*, got 'cod_llama'"):
        to_lns(tiny_model("cod_llama", "pre"))
    with pytest.raises(ValueError, match="norm_placement: expected one of reordered, sandwich, got 'lns'"):
        to_lns(fold_lns(tiny_model("cod_olmo2", "reordered")))


def test_layers_that_are_not_ours_are_refused():
    model = tiny_model("cod_llama", "lns")
    model.model.layers[1] = fold_lns(model).model.layers[1]
    with pytest.raises(ValueError, match="layers: expected layers with a norm placement, got LlamaDecoderLayer"):
        fold_lns(model)
    model = tiny_model("cod_llama", "post")
    model.config.norm_placement = "lns"
    with pytest.raises(ValueError, match="norm_placement: expected 'post', as the layers were built, got 'lns'"):
        fold_lns(model)


def test_compiled_models_are_unwrapped():
    model = tiny_model("cod_llama", "lns")
    stock = fold_lns(torch.compile(model))
    assert gap(model, stock, "cod_llama") <= 1e-5
    assert gap(to_lns(torch.compile(stock)), stock, "cod_llama") <= 1e-5


def test_adapters_are_refused():
    model = get_peft_model(tiny_model("cod_llama", "lns"), LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"source: .* PEFT adapters; call merge_and_unload first"):
            fold_lns(wrapped)
    merged = model.merge_and_unload()
    assert gap(fold_lns(merged), merged, "cod_llama") <= 1e-5


def test_offloaded_weights_and_foreign_modules_are_refused():
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="source: expected all weights in memory, got some that are offloaded"):
        to_lns(empty)
    with pytest.raises(ValueError, match="source: expected a model of transformers, got Linear"):
        fold_lns(torch.nn.Linear(2, 2))


def test_every_weight_keeps_its_own_dtype():
    model = tiny_model("cod_llama", "lns", tie_word_embeddings=True).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    with torch.no_grad():
        model.model.norm.weight.fill_(1 + 2**-20)
    stock = fold_lns(model)
    assert {name: w.dtype for name, w in stock.state_dict().items()} == {
        name: w.dtype for name, w in model.state_dict().items()
    }
    assert stock.dtype == stock.config.dtype == torch.bfloat16
    assert (stock.model.norm.weight == 1 + 2**-20).all()
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    norm = "model.layers.2.input_layernorm.weight"
    expected = model.state_dict()[norm].double() / math.sqrt(3)
    assert torch.equal(stock.state_dict()[norm], expected.float())


def perplexity(model, batch):
    with torch.no_grad():
        return math.exp(model(batch, labels=batch).loss.item())


def test_smollm2_to_lns_and_back_keeps_its_perplexity(smollm2, brown_text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    batch = tokenizer(brown_text, return_tensors="pt").input_ids[:, :1024].view(4, 256)
    expected = perplexity(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), batch)
    assert 20 < expected < 100
    lns = to_lns(smollm2, tmp_path / "lns")
    assert perplexity(lns, batch) == pytest.approx(expected, rel=1e-5)
    del lns
    fold_lns(tmp_path / "lns", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert perplexity(stock, batch) == pytest.approx(expected, rel=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "lns")("depth").input_ids == tokenizer("depth").input_ids


@pytest.mark.slow
def test_smollm2_in_bfloat16_moves_by_less_than_bfloat16_itself(smollm2, brown_text):
    """The figures of docs/benchmarks/pretraining.md; run with -s to see them."""
    batch = AutoTokenizer.from_pretrained(smollm2)(brown_text, return_tensors="pt").input_ids[:, :128]
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(batch).logits
        half = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        plain = half(batch).logits.float()
        lns = to_lns(half)
        there, back = lns(batch).logits.float(), fold_lns(lns)(batch).logits.float()

    def move(one, other):
        return ((one - other).norm() / other.norm()).item()

    moves = {"rounding to bfloat16": move(plain, exact), "to lns": move(there, plain), "and back": move(back, plain)}
    print("moves of the logits, relative to their norm:", {name: f"{value:.2%}" for name, value in moves.items()})
    assert 0 < moves["to lns"] < 1.5 * moves["rounding to bfloat16"]
    assert moves["and back"] < 1.5 * moves["rounding to bfloat16"]


def test_vision_model_is_folded():
    model = tiny_model("cod_vit", "lns", AutoModelForImageClassification)
    stock = fold_lns(model)
    assert type(stock).__name__ == "ViTForImageClassification"
    assert gap(model, stock, "cod_vit") <= 1e-5
