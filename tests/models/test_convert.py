import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
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

from hf_cod.cli import main as cli
from hf_cod.commands.convert import main
from hf_cod.models import AUTHORS_NORM_TYPES, PLACEMENTS, CodLlamaForCausalLM, fold_lns, from_authors, to_lns

from .references import language_model
from .tiny import BY_TYPE, TEXT, inputs, tiny_model, tokens

FOLDABLE = ("pre", "scaled_init", "lns")
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


def test_folding_goes_into_the_norms_of_deeper_layers_only():
    model = tiny_model("cod_llama", "lns")
    old, new = model.state_dict(), fold_lns(model).state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{i}.{n}_layernorm.weight" for i in (1, 2, 3) for n in ("input", "post_attention")}
    name = "model.layers.3.input_layernorm.weight"
    assert torch.equal(new[name], old[name] / 2)


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
    with pytest.raises(ValueError, match=f"expected one of pre, scaled_init, lns; got '{placement}'.*{WHY[placement]}"):
        fold_lns(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_foldable_placement_is_one_that_the_stock_family_has():
    with pytest.raises(ValueError, match="expected one of reordered; got 'sandwich'"):
        fold_lns(tiny_model("cod_olmo2", "sandwich"))


@pytest.mark.parametrize("model_type", ["cod_qwen2", "cod_qwen3"])
def test_alternating_sliding_windows_are_kept(model_type):
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    model = tiny_model(model_type, "lns", **windows)
    assert gap(model, fold_lns(model), model_type) <= 1e-5
    assert gap(model, tiny_model(model_type, "lns"), model_type) > 1e-3


def test_wrong_sources():
    with pytest.raises(ValueError, match=r"expected a model of type cod_llama, .*; got 'gpt2'"):
        fold_lns(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)))
    with pytest.raises(ValueError, match=r"expected a model of type llama, .*; got 'cod_llama'"):
        to_lns(tiny_model("cod_llama", "pre"))
    with pytest.raises(ValueError, match="norm_placement: expected one of reordered, sandwich; got 'lns'"):
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
    with pytest.raises(ValueError, match="source: expected weights in memory, got some that are offloaded"):
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


CONVERSIONS = [fold_lns, to_lns, lambda source, output=None: from_authors(source, "pre", output=output)]


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["fold_lns", "to_lns", "from_authors"])
def test_a_source_that_is_not_there(convert, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "weightless")
    places = [tmp_path / "nowhere", "nobody/nothing", tmp_path / "empty"]
    if convert is not fold_lns:
        places.append(tmp_path / "weightless")
    for place in places:
        with pytest.raises(
            ValueError, match=f"source: expected a directory with a checkpoint or a Hub id, got '{place}'"
        ):
            convert(place)


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["fold_lns", "to_lns", "from_authors"])
def test_an_output_that_exists_is_refused_before_anything_is_read(convert, tmp_path):
    with pytest.raises(ValueError, match="output: expected a path that does not exist yet"):
        convert(tmp_path / "nowhere", tmp_path)


def test_a_hub_id_brings_its_tokenizer(tmp_path, monkeypatch):
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    fold_lns(tiny_model("cod_llama", "lns"), repository / "snapshots" / commit)
    for name in ("tokenizer.json", "chat_template.json"):
        (repository / "snapshots" / commit / name).write_text(f'"{name}"')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    to_lns("someone/tiny", tmp_path / "lns")
    assert json.loads((tmp_path / "lns" / "tokenizer.json").read_text()) == "tokenizer.json"
    assert json.loads((tmp_path / "lns" / "chat_template.json").read_text()) == "chat_template.json"
    assert not (tmp_path / "lns" / "vocab.json").exists()


class ReadTimeout(Exception):
    """Stands for the error of the library beneath the Hub's, which reaches the caller as it is."""


ReadTimeout.__module__ = "httpx"


@pytest.mark.parametrize("error", [OSError("no route"), ReadTimeout("too slow")], ids=["refused", "slow"])
def test_a_network_that_fails_at_the_tokenizer_writes_nothing(error, tmp_path, monkeypatch, capsys):
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path / "source")
    asked = []

    def cached_file(source, name, **options):
        asked.append(name)
        if name == "tokenizer_config.json":
            raise error
        return None

    monkeypatch.setattr("hf_cod.models.checkpoint.cached_file", cached_file)
    before = sorted(tmp_path.iterdir())
    assert cli(["convert", "stock", str(tmp_path / "source"), str(tmp_path / "stock")]) == 2
    told = capsys.readouterr().err
    assert "hf-cod convert: error: source: expected tokenizer_config.json of" in told and str(error) in told
    assert len(asked) > 1 and sorted(tmp_path.iterdir()) == before


def test_our_own_mistakes_are_not_taken_for_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cod.models.checkpoint.cached_file", lambda *args, **kwargs: {}["bug"])
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path / "source")
    with pytest.raises(KeyError, match="bug"):
        fold_lns(tmp_path / "source", tmp_path / "stock")


OUTSIDE = """
import sys, torch
from transformers import AutoModelForCausalLM
logits = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    logits[name] = model(torch.load(sys.argv[1])).logits
assert "hf_cod" not in sys.modules
torch.save(logits, "logits.pt")
"""


def test_the_stock_model_loads_without_us(tmp_path):
    models = {name: tiny_model(name, "lns") for name in ("cod_llama", "cod_qwen2", "cod_qwen3")}
    for name, model in models.items():
        fold_lns(model, tmp_path / name)
    torch.save(tokens(), tmp_path / "tokens.pt")
    env = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OUTSIDE, "tokens.pt", *models]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = torch.load(tmp_path / "logits.pt")
    for name, model in models.items():
        assert (logits[name] - model(tokens()).logits).abs().max() <= 1e-5, name


def test_directories_in_and_out(tmp_path):
    model = tiny_model("cod_qwen2", "lns")
    model.save_pretrained(tmp_path / "lns")
    (tmp_path / "lns" / "tokenizer.json").write_text("{}")
    fold_lns(tmp_path / "lns", tmp_path / "new" / "stock")
    written = {path.name for path in (tmp_path / "new" / "stock").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert AutoConfig.from_pretrained(tmp_path / "new" / "stock").model_type == "qwen2"

    to_lns(tmp_path / "new" / "stock", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (again(tokens()).logits - model(tokens()).logits).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="output: expected a path that does not exist yet"):
        fold_lns(tmp_path / "lns", tmp_path / "new" / "stock")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("cod_llama", "lns")

    def fail(self, target):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.rename", fail)
    with pytest.raises(OSError, match="no space left"):
        fold_lns(model, tmp_path / "stock")
    assert not list(tmp_path.iterdir())


AUTHORS_CONFIG = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 61,
}
# NORM_TYPE -> the placement of the reference that has its function, for deeppost with the gain sqrt(8).
AUTHORS_FUNCTION = {"scale_pre": "pre", "deeppost": "deepnorm", "post_pre": "mix", "scale_post_pre": "mix"}


def authors_state(norm_type):
    """The state dict of the authors' code: names of its modules, and the buffers that it saves."""
    function = AUTHORS_FUNCTION.get(norm_type, norm_type)
    model = tiny_model("cod_llama", function, num_key_value_heads=4)
    state = {f"module.{name}": weight for name, weight in model.state_dict().items()}
    for i in range(4):
        state[f"module.model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    return function, state


@pytest.mark.parametrize("norm_type", AUTHORS_NORM_TYPES)
def test_checkpoints_of_the_authors(norm_type):
    function, state = authors_state(norm_type)
    post_layers = 2 if function == "mix" else None
    model = from_authors(state, norm_type.upper(), AUTHORS_CONFIG, post_layers)
    assert isinstance(model, CodLlamaForCausalLM)
    assert (model.config.pad_token_id, model.config.max_position_embeddings) == (None, 1024)
    weights = {name.removeprefix("module."): weight for name, weight in state.items()}
    config = {**model.config.to_dict(), "norm_placement": function}
    alpha = math.sqrt(8) if norm_type == "deeppost" else None
    expected = language_model(weights, "llama", config, tokens(), 2, alpha)
    assert (model(tokens()).logits - expected).abs().max() <= 1e-5


def test_a_directory_of_the_authors(tmp_path):
    _, state = authors_state("lns")
    state = {name.removeprefix("module."): weight.clone() for name, weight in state.items()}
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    model = from_authors(tmp_path / "old", "LNS", output=tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert torch.equal(from_authors(state, "lns", AUTHORS_CONFIG)(tokens()).logits, model(tokens()).logits)


def test_a_pickled_directory_of_the_authors(tmp_path):
    _, state = authors_state("lns")
    state = {name.removeprefix("module."): weight.clone() for name, weight in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")  # what their version of transformers writes
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    expected = from_authors(state, "lns", AUTHORS_CONFIG)
    assert torch.equal(from_authors(tmp_path, "lns")(tokens()).logits, expected(tokens()).logits)


def test_a_directory_of_distributed_training(tmp_path):
    _, state = authors_state("sandwich")
    save_file({name: weight.clone() for name, weight in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    model = from_authors(tmp_path, "sandwich")
    expected = from_authors(state, "sandwich", AUTHORS_CONFIG)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_the_command_takes_the_norm_type_in_any_case(tmp_path):
    _, state = authors_state("lns")
    save_file({name: weight.clone() for name, weight in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    assert main(["authors", str(tmp_path), str(tmp_path / "new"), "--norm-type", "LNS"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "new").norm_placement == "lns"


def test_bad_checkpoints_of_the_authors():
    _, state = authors_state("pre")
    with pytest.raises(ValueError, match=r"norm_type: expected one of pre, .*; got 'mono'"):
        from_authors(state, "mono", AUTHORS_CONFIG)
    with pytest.raises(ValueError, match=r"config: expected the contents of config.json"):
        from_authors(state, "pre")
    with pytest.raises(ValueError, match="post_layers: expected a number from 0 to 4, got None"):
        from_authors(state, "post_pre", AUTHORS_CONFIG)
    with pytest.raises(
        ValueError, match="post_layers: expected None unless norm_type is post_pre or scale_post_pre, got 2"
    ):
        from_authors(state, "pre", AUTHORS_CONFIG, post_layers=2)
    with pytest.raises(ValueError, match=r"source: expected exactly the weights.*post_feedforward_layernorm"):
        from_authors(state, "post", AUTHORS_CONFIG)


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


def test_smollm2_in_bfloat16_moves_by_less_than_bfloat16_itself(smollm2, brown_text):
    """The figures of README; run with -s to see them."""
    batch = AutoTokenizer.from_pretrained(smollm2)(brown_text, return_tensors="pt").input_ids[:, :512].view(2, 256)
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
