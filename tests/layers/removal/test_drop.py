import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import WidthPlan, drop, find_decoder_layers, narrow, quantize, skip
from hf_cod.layers.removal import config_surgery
from hf_cod.layers.removal.drop import check_drop
from hf_cod.models import PLACEMENTS, CodLlamaConfig, CodLlamaForCausalLM
from tests.fresh_processes import run_fresh
from tests.references import without_layer
from tests.tiny_models import CAUSAL, FAMILIES, batch_for, build


def snapshot(model):
    """Everything that a removal touches: config, weights and each layer's idea of its place."""
    places = [(n, m.layer_idx) for n, m in model.named_modules() if hasattr(m, "layer_idx")]
    return copy.deepcopy(model.config.to_dict()), places, [(n, id(p)) for n, p in model.named_parameters()]


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def dropped(model, removed, directory):
    """The model after `drop`, which computes what `skip` does, also if it is saved and loaded."""
    batch = {"input_ids": torch.arange(3, 11)[None]}
    with skip(model, removed):
        expected = output(model, batch)
    drop(model, removed)
    torch.testing.assert_close(output(model, batch), expected, atol=0, rtol=0)
    model.save_pretrained(directory)
    loaded = type(model).from_pretrained(directory).eval()
    torch.testing.assert_close(output(loaded, batch), expected, atol=1e-6, rtol=1e-6)
    return model


@pytest.mark.parametrize("removed", [0, 2, [1, 3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_skip_computes_the_model_without_the_layers_and_leaves_no_trace(family, removed):
    model = build(family)
    batch, before = batch_for(model), snapshot(model)
    intact = output(model, batch)
    reference = model
    for index in [removed] if isinstance(removed, int) else removed:
        reference = without_layer(reference, index)
    with skip(model, removed):
        torch.testing.assert_close(output(model, batch), output(reference, batch), atol=1e-6, rtol=1e-6)
    assert snapshot(model) == before
    torch.testing.assert_close(output(model, batch), intact, atol=0, rtol=0)


def test_skip_comes_back_after_an_exception():
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(RuntimeError), skip(model, [0, 1]):
        assert len(find_decoder_layers(model)) == 2
        raise RuntimeError("in the block")
    assert snapshot(model) == before


def test_skip_generates_with_a_cache():
    model = build("llama")
    ids = batch_for(model)["input_ids"]
    with skip(model, 0):
        cached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
        plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("removed", [[0], [1, 2]])
@pytest.mark.parametrize("family", CAUSAL)
def test_drop_saves_reloads_and_generates(family, removed, tmp_path):
    model = build(family)
    batch = batch_for(model)
    with skip(model, removed):
        expected = output(model, batch)
    assert drop(model, removed) == [i for i in range(4) if i not in removed]
    torch.testing.assert_close(output(model, batch), expected, atol=0, rtol=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == len(find_decoder_layers(again)) == 4 - len(removed)
    # Not bit for bit: transformers may choose another kernel for the experts of a loaded model.
    torch.testing.assert_close(output(again, batch), expected, atol=1e-6, rtol=1e-5)
    cached = again.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=True)
    plain = again.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.process
def test_drop_loads_without_this_package(tmp_path):
    model = build("llama")
    drop(model, [1])
    model.save_pretrained(tmp_path / "model")
    batch = batch_for(model)
    torch.save(output(model, batch), tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers\n"
        "folder = sys.argv[1]\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder + '/model').eval()\n"
        "ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))\n"
        "logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits\n"
        "assert 'hf_cod' not in sys.modules\n"
        "assert torch.equal(logits, torch.load(folder + '/expected.pt'))\n"
    )
    done = run_fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_drop_cuts_layer_types_with_their_layers():
    model = build("gemma3", layers=6)
    types = list(model.config.layer_types)
    assert len(set(types)) == 2
    drop(model, [0, 1])
    assert model.config.layer_types == types[2:]


def test_drop_renumbers_lists_of_indices_and_leading_counts():
    moe = build("qwen2_moe")  # layer 1 is dense
    drop(moe, [0])
    assert moe.config.mlp_only_layers == [0]
    deepseek = build("deepseek_v3")  # layers 0 and 1 are dense
    drop(deepseek, [1])
    assert deepseek.config.first_k_dense_replace == 1


def test_drop_keeps_the_flags_of_layers_without_rotation(tmp_path):
    """SmolLM3 and Llama 4 list a flag for each layer, and are built by it."""
    for kind in ("smollm3", "llama4_text"):
        model = build_type(kind)
        assert model.config.no_rope_layers == [1, 1, 1, 0]
        dropped(model, [0, 2], tmp_path / kind)
        assert model.config.no_rope_layers == [1, 0]


@pytest.mark.parametrize(
    ("kind", "field", "before", "after"),
    [
        ("llama4_text", "moe_layers", [1, 3], [0, 2]),
        ("bamba", "attn_layer_indices", [1, 3], [0, 2]),
    ],
)
def test_drop_renumbers_layers_that_are_listed_by_index(kind, field, before, after, tmp_path):
    """Without layer 0, each is one place earlier; of a removed layer none is left."""
    config = tiny_config(kind)
    setattr(config, field, before)
    model = AutoModelForCausalLM.from_config(config).eval()
    dropped(model, 0, tmp_path / "first")
    assert getattr(model.config, field) == after
    drop(model, after[1])
    assert getattr(model.config, field) == [after[0]]


def test_a_list_of_indices_that_nobody_knows(tmp_path, monkeypatch):
    """Without the field's name in the vocabulary: the class of Llama 4's config makes such a list for any number of
    layers, and shows what it is. Of Bamba's the built model says so, whose layers are of other kinds."""
    monkeypatch.setattr(config_surgery, "INDEX_LIST_FIELDS", ())
    config = tiny_config("llama4_text")
    config.moe_layers = [1, 3]
    assert dropped(AutoModelForCausalLM.from_config(config).eval(), 0, tmp_path).config.moe_layers == [0, 2]
    config = tiny_config("bamba")
    config.attn_layer_indices = [1, 3]
    model = AutoModelForCausalLM.from_config(config).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^layers: expected kept layers that the config of .* can describe"):
        drop(model, 0)
    assert snapshot(model) == before


@pytest.mark.parametrize(("removed", "pattern"), [(0, "E*-"), ([1, 3], "M*")])
def test_drop_cuts_a_pattern_of_letters(removed, pattern, tmp_path):
    """Nemotron-H's config is read as a pattern, and kept as a list by layer."""
    config = tiny_config("nemotron_h")
    made = type(config)(**{**_own(config, "layers_block_type", "layer_types"), "hybrid_override_pattern": "ME*-"})
    assert made.num_hidden_layers == 4
    model = dropped(AutoModelForCausalLM.from_config(made).eval(), removed, tmp_path)
    assert model.config.hybrid_override_pattern == pattern
    assert type(config).from_pretrained(tmp_path).hybrid_override_pattern == pattern


def _own(config, *without):
    """The entries of a config, without some of them."""
    return {name: value for name, value in config.to_dict().items() if name not in without}


def test_layers_that_predict_further_tokens_are_promised_no_more(tmp_path):
    """They are in the files only; skip puts the number back, and so does a refusal."""
    model = build("deepseek_v3", num_nextn_predict_layers=1)
    with skip(model, 0):
        assert model.config.num_nextn_predict_layers == 0
    assert model.config.num_nextn_predict_layers == 1
    with pytest.raises(ValueError, match="at least one"):
        drop(model, range(4))
    assert model.config.num_nextn_predict_layers == 1
    dropped(model, 3, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["num_hidden_layers"], stored["num_nextn_predict_layers"]) == (3, 0)


def test_drop_refuses_what_the_config_cannot_say():
    model = build("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[])
    before, batch = snapshot(model), batch_for(model)
    expected = output(model, batch)
    with pytest.raises(ValueError, match="layers: expected kept layers that the config of"):
        drop(model, [0])
    assert snapshot(model) == before, "a refused drop changes nothing"
    torch.testing.assert_close(output(model, batch), expected, atol=0, rtol=0)


def test_what_can_be_dropped_is_known_before():
    model, mixture = build("llama"), build("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[])
    before = snapshot(model), snapshot(mixture)
    check_drop(model, [1, 2])
    with pytest.raises(ValueError, match="layers: expected kept layers that the config of"):
        check_drop(mixture, [0])
    check_drop(mixture, [0, 1])
    assert (snapshot(model), snapshot(mixture)) == before


def test_drop_keeps_peft_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    batch = batch_for(model.get_base_model())
    with skip(model, 1):
        expected = output(model, batch)
    drop(model, 1)
    torch.testing.assert_close(output(model, batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "removed, message", [([4], "from 0 to 3, got"), (-1, "from 0 to 3"), (range(4), "at least one")]
)
def test_bad_layers(removed, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        drop(model, removed)
    with pytest.raises(ValueError, match=message), skip(model, removed):
        pass
    assert len(find_decoder_layers(model)) == 4


def test_drop_refuses_a_first_layer_of_another_kind():
    """ModernBERT's layer 0 has no attention norm: a reload would give the new first layer none either."""
    config = CONFIG_MAPPING["modernbert"](
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4, pad_token_id=0
    )
    model = AutoModel.from_config(config).eval()
    with pytest.raises(ValueError, match="layers: expected kept layers that the config of"):
        drop(model, [0])
    assert len(find_decoder_layers(model)) == 4


@pytest.mark.parametrize("removed", [[0], [1, 2]])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_drop_keeps_each_placements_depth(placement, removed, tmp_path):
    config = CodLlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4,
        norm_placement=placement, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = CodLlamaForCausalLM(config).eval()
    batch = batch_for(model)
    with skip(model, removed):
        expected = output(model, batch)
    before = snapshot(model)
    with skip(model, removed):
        pass
    assert snapshot(model) == before
    drop(model, removed)
    torch.testing.assert_close(output(model, batch), expected, atol=0, rtol=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output(again, batch), expected, atol=1e-6, rtol=1e-5)
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(rebuilt, batch), expected, atol=0, rtol=0)


def test_drop_on_a_model_with_a_compiled_layer():
    model = build("llama")
    model.model.layers[2] = torch.compile(model.model.layers[2])
    assert drop(model, [0]) == [1, 2, 3]


def two_towers(**fields):
    """A text model of five layers, a vision tower of three."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "num_hidden_layers": 3,
            "image_size": 16,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", **sizes, "num_hidden_layers": 5, "vocab_size": 99},
        **fields,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def test_the_vision_tower_of_a_vision_language_model_has_its_own_config():
    model = two_towers()
    assert len(find_decoder_layers(model)) == 5
    path = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    with skip(model, 0, layers_path=path):
        assert model.config.text_config.num_hidden_layers == 5
        assert model.config.vision_config.num_hidden_layers == 2
    drop(model, 1, layers_path=path)
    assert model.config.vision_config.num_hidden_layers == 2


def test_each_tower_keeps_its_record_of_shapes(tmp_path):
    """The stacks of both are called "layers"."""
    model = two_towers()
    tower = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    narrow(model, WidthPlan(0.7, [4] * 3, [48, 32, 16], "mine"), "magnitude", "none", layers_path=tower)
    narrow(model, WidthPlan(0.7, [4] * 5, [48, 32, 40, 16, 24], "mine"), "magnitude", "none")
    before = copy.deepcopy(model.config.module_shapes)
    with skip(model, 0):
        assert len(model.config.module_shapes) == len(before)  # layer 0 is whole
    assert model.config.module_shapes == before
    drop(model, [1])
    found = {n: sizes["in_features"] for n, sizes in model.config.module_shapes.items() if "in_features" in sizes}
    assert {n: size for n, size in found.items() if "vision" in n} == {
        f"vision_tower.encoder.layers.{i}.mlp.fc2": size for i, size in ((1, 32), (2, 16))
    }
    assert {n: size for n, size in found.items() if "vision" not in n} == {
        f"language_model.layers.{i}.mlp.down_proj": size for i, size in ((1, 40), (2, 16), (3, 24))
    }
    model.save_pretrained(tmp_path)
    state = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bart", "marian", "prophetnet", "gpt_neo"])
def test_drop_where_the_config_counts_or_describes_layers_in_a_second_field(kind, tmp_path):
    sizes = {
        "bart": {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4},
        "marian": {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4},
        "prophetnet": {"hidden_size": 32, "num_encoder_layers": 4, "num_decoder_layers": 4},
        "gpt_neo": {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "window_size": 2,
            "attention_types": [[["global", "local"], 2]],
        },
    }[kind]
    if kind == "prophetnet":
        sizes |= {"num_decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **ids)).eval()
    config = dropped(model, [1], tmp_path).config
    if kind == "gpt_neo":  # readers of either field see the same layers
        assert config.expand_attention_types_params(config.attention_types) == ["global", "global", "local"]
        assert config.attention_layers == ["global", "global", "local"]


def test_drop_renumbers_overrides_by_layer(tmp_path):
    model = build_type("gemma4_unified_text")
    dropped(model, [1], tmp_path)


def test_drop_scales_a_number_that_is_divided_by_the_depth(tmp_path):
    """MiniCPM3 adds what a layer computes times `scale_depth` / √depth."""
    model = dropped(build_type("minicpm3"), [1, 2], tmp_path)
    assert model.config.scale_depth == pytest.approx(1.4 / 2**0.5)


def test_drop_counts_consecutive_kinds_of_layers(tmp_path):
    """The first and the last layer of Dory run once, those between them several times."""
    model = dropped(build_type("dory"), [0, 1], tmp_path)
    assert (model.config.n_input_layers, model.config.n_recurrent_layers, model.config.n_output_layers) == (0, 1, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("encoder/esm", "weights outside of the layers"), ("diffllama", "lambda_init")],
)
def test_drop_refuses_in_one_line_what_a_config_cannot_say(kind, reason):
    model = build_type(kind)
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason) as caught:
        drop(model, [1])
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


def test_errors_of_config_classes_are_told_in_one_line():
    """Such an error (StrictDataclassError) is no ValueError."""

    class Strict(LlamaConfig):
        def __setattr__(self, name, value):
            if name == "num_hidden_layers" and value == 3:
                raise StrictDataclassError("num_hidden_layers:\n    an even number")
            super().__setattr__(name, value)

    model = build("llama")
    model.config.__class__ = Strict
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^layers: expected .* can describe, got StrictDataclassError: num_"
    ) as caught:
        drop(model, [1])
    assert "\n" not in str(caught.value) and snapshot(model) == before


def test_layers_that_share_weights_are_refused():
    model = build_type("zamba2")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^layers: expected layers with weights of their own, .* which layer 1 shares$"
    ):
        drop(model, 0)
    with pytest.raises(ValueError, match="which layer 1 shares"), skip(model, 0):
        pass
    assert snapshot(model) == before


@pytest.mark.parametrize(("kind", "removed"), [("jamba", 0), ("recurrent_gemma", 1)])
def test_skip_where_the_config_computes_the_kinds_of_layers(kind, removed):
    """The cache is made by these kinds."""
    model = build_type(kind)
    ids, before = torch.arange(3, 11)[None], snapshot(model)
    kinds = model.config.layers_block_type
    with skip(model, removed):
        assert model.config.layers_block_type == [*kinds[:removed], *kinds[removed + 1 :]]
        cached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
        plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert snapshot(model) == before and model.config.layers_block_type == kinds


def test_drop_writes_out_a_pattern_of_layers(tmp_path):
    """RecurrentGemma repeats `block_types`; Jamba's period is a number, which cannot describe every stack."""
    model = dropped(build_type("recurrent_gemma"), 1, tmp_path)
    assert model.config.block_types == ["recurrent", "attention", "recurrent"]
    other = build_type("jamba")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"^layers: expected kept layers .* for layer_types, which it computes"):
        drop(other, 0)
    assert snapshot(other) == before


@pytest.mark.parametrize(("stages", "left"), [(["stage1", "stage4"], ["stage1", "stage3"]), (["stage2"], ["stage1"])])
def test_drop_moves_the_stages_that_a_backbone_returns(stages, left, tmp_path):
    """A returned stage whose layer is removed is that of the layer before it."""
    model = AutoBackbone.from_config(_returning(stages)).eval()
    batch = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    with skip(model, 1):
        expected = output(model, batch)
    drop(model, 1)
    assert model.config.out_features == left
    assert all(torch.equal(a, b) for a, b in zip(output(model, batch), expected, strict=True))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for found, wanted in zip(output(loaded, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_two_returned_stages_need_two_layers():
    model = AutoBackbone.from_config(_returning(["stage1", "stage2"])).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^layers: expected one kept layer for each stage of out_indices, got"):
        drop(model, 1)
    assert snapshot(model) == before


def _returning(stages):
    config = tiny_config("vision/dinov2")
    config.out_features = stages
    return config


def test_quantized_weights_are_refused_with_their_name():
    model = build("llama", intermediate_size=64, hidden_size=64)
    quantize(model, bits=3)
    with pytest.raises(ValueError, match=r"^model: expected plain floating-point weights, got weights stored by hf"):
        drop(model, 1)
    with skip(model, 1):
        assert output(model, batch_for(model)).isfinite().all()
    drop(model.dequantize(), 1)


def test_the_only_layer_of_attention_is_refused():
    """By it the cache of a hybrid counts its tokens, also of the model in `skip`."""
    model = build_type("qwen3_5_text")
    before = snapshot(model)
    for remove in (lambda: drop(model, 3), skip(model, 3).__enter__):
        with pytest.raises(ValueError, match=r"^layers: expected to keep a layer of attention, by"):
            remove()
        assert snapshot(model) == before
    drop(model, 0)
