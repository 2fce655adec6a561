import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_cod.models import PLACEMENTS, CodLlamaConfig, CodLlamaForCausalLM, CodOlmo2Config
from hf_cod.models.modifiers import ActivationScaling
from hf_cod.models.placements import (
    LAYER_SCALED,
    DeepNorm,
    LayerNormScaling,
    NormPlacement,
    PostNorm,
    PreNorm,
    n_post_layers,
)

from . import references
from .tiny import CASES, N_LAYERS, POST_LAYERS, TEXT, inputs, tiny_config, tiny_model, tokens


def reference_logits(model, weights, batch):
    config = model.config.to_dict()
    if config["model_type"] == "cod_vit":
        return references.vision_model(weights, config, batch["pixel_values"], POST_LAYERS)
    family = config["model_type"].removeprefix("cod_")
    return references.language_model(weights, family, config, batch["input_ids"], POST_LAYERS)


@pytest.mark.parametrize(("model_type", "placement"), CASES)
def test_logits_and_gradients_equal_the_reference(model_type, placement):
    check_reference(tiny_model(model_type, placement), inputs(model_type))


MODIFIED = [
    *({"placement": placement, "gpas": True} for placement in PLACEMENTS),
    *({"placement": placement, "layer_scale": 0.3} for placement in LAYER_SCALED),
    {"placement": "lns", "gpas": True, "layer_scale": 1.0, "lns_exponent": 0.3},
    {"placement": "lns_output", "lns_exponent": 0.0},
]


@pytest.mark.parametrize("fields", MODIFIED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_modified_placements_equal_the_reference(fields, tmp_path):
    model = tiny_model("cod_llama", **fields)
    check_reference(model, inputs("cod_llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert loaded.config.cod_code_version == 2
    generated = [
        m.generate(tokens(), max_new_tokens=5, use_cache=cache) for m in (model, loaded) for cache in (True, False)
    ]
    assert all(torch.equal(one, generated[0]) for one in generated)


@pytest.mark.parametrize("fields", [{"gpas": True}, {"layer_scale": 1e-5}, {"lns_exponent": 0.25}], ids=str)
@pytest.mark.parametrize("placement", ["lns", "lns_output"])
def test_a_modified_vit_equals_the_reference(placement, fields):
    check_reference(tiny_model("cod_vit", placement, **fields), inputs("cod_vit"))


def check_reference(model, batch):
    """Logits and gradients."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    expected = reference_logits(model, weights, batch)
    got = model(**batch).logits
    assert (got - expected).abs().max() <= 1e-5
    assert got.std() > 0.1

    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    (got * direction).sum().backward()
    for name, parameter in model.named_parameters():
        scale = weights[name].grad.abs().max()
        assert (parameter.grad - weights[name].grad).abs().max() <= 1e-4 * scale + 1e-5, name


def test_placements_are_different_functions():
    # Same seed, same names wherever a norm is shared: only the wiring differs. Scaled init differs at the start only.
    logits = {name: tiny_model("cod_llama", name)(tokens()).logits for name in PLACEMENTS if name != "scaled_init"}
    names = list(logits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (logits[one] - logits[other]).abs().max() > 1e-2, (one, other)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norms_carry_the_names_of_the_checkpoints(placement):
    names = {
        "post": {"post_attention_layernorm", "post_feedforward_layernorm"},
        "pre": {"input_layernorm", "post_attention_layernorm"},
    }
    names |= {"deepnorm": names["post"], "reordered": names["post"], "mix": names["post"]}
    names |= {"lns": names["pre"], "lns_output": names["pre"], "scaled_init": names["pre"]}
    names["sandwich"] = names["pre"] | names["post"] | {"pre_feedforward_layernorm"}
    model = tiny_model("cod_llama", placement)
    first = {name for name, _ in model.model.layers[0].named_children() if "norm" in name}
    assert first == names[placement]
    last = {name for name, _ in model.model.layers[-1].named_children() if "norm" in name}
    assert last == (names["pre"] if placement == "mix" else names[placement])


class NormAfterValues(NormPlacement):
    norms = ("input_layernorm", "value_norm")

    def forward(self, layer, x, attention, mlp):
        return x + layer.value_norm(attention(x)) + mlp(layer.input_layernorm(x))


def test_the_next_placement_is_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(PLACEMENTS, "parallel", NormAfterValues)
    model = tiny_model("cod_llama", "parallel")
    norms = {name for name, _ in model.model.layers[0].named_children() if "norm" in name}
    assert norms == {"input_layernorm", "value_norm"}
    model.save_pretrained(tmp_path)
    loaded = CodLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_modifiers_start_as_their_papers_say():
    """A new model computes what it does without a gate; LayerScale is the number of the config, in float32 exactly."""
    plain = new_model(norm_placement="pre")
    gated = new_model(norm_placement="pre", gpas=True)
    assert torch.equal(gated(tokens()).logits, plain(tokens()).logits)
    assert all(layer.activation_scaling.gate.item() == 0 for layer in gated.model.layers)
    scaled = new_model(norm_placement="pre", layer_scale=0.1)
    weights = [
        getattr(layer, name).weight for layer in scaled.model.layers for name in ("attention_scale", "mlp_scale")
    ]
    assert len(weights) == 2 * N_LAYERS and all(torch.equal(w, torch.full((32,), 0.1)) for w in weights)
    assert torch.equal(new_model(norm_placement="pre", layer_scale=1.0)(tokens()).logits, plain(tokens()).logits)


def new_model(**fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CodLlamaConfig(**TEXT, **fields)).eval()


def test_a_gate_preserves_gradients():
    """That of x does not depend on the gate; its value does."""
    scaling = ActivationScaling()
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        scaling.gate.fill_(0.7)
    y = scaling(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    torch.testing.assert_close(y, x * (1 - 0.7 / (1 + math.exp(-0.7))))
    torch.testing.assert_close(
        scaling.gate.grad,
        torch.autograd.functional.jacobian(
            lambda g: (x.detach() * (1 - g * torch.sigmoid(g))).sum(), scaling.gate.detach()
        ),
    )


def test_the_exponent_can_be_set():
    model = tiny_model("cod_llama", "lns", lns_exponent=0.0)
    pre = tiny_model("cod_llama", "pre")
    assert torch.equal(model(tokens()).logits, pre(tokens()).logits)
    model.set_lns_exponent(0.5)
    assert model.config.lns_exponent == 0.5
    assert torch.equal(model(tokens()).logits, tiny_model("cod_llama", "lns")(tokens()).logits)
    for wrong, number in ((pre, 0.2), (model, 2.0)):
        with pytest.raises(ValueError, match=r"^lns_exponent: expected"):
            wrong.set_lns_exponent(number)
        assert wrong.config.lns_exponent == 0.5


def test_mix_ln_takes_the_ceiling_and_is_immune_to_rounding():
    layers = tiny_model("cod_llama", "mix").model.layers
    assert [type(layer.placement) for layer in layers] == [PostNorm] * 2 + [PreNorm] * 2
    assert [n_post_layers(0.25, n) for n in (12, 24, 32)] == [3, 6, 8]
    assert n_post_layers(0.1, 30) == 3  # 0.1 * 30 is 3.0000000000000004
    assert all(n_post_layers(k / n, n) == k for n in range(1, 100) for k in range(n + 1))
    assert n_post_layers(0.26, 12) == 4


@pytest.mark.parametrize(("fraction", "placement"), [(0, "pre"), (0.0, "pre"), (1, "post"), (1.0, "post")])
def test_mix_ln_at_its_bounds(fraction, placement):
    mixed = tiny_model("cod_llama", "mix", post_ln_fraction=fraction)
    assert torch.equal(mixed(tokens()).logits, tiny_model("cod_llama", placement)(tokens()).logits)


def test_lns_scale_is_a_float_and_no_buffer():
    model = tiny_model("cod_llama", "lns")
    scales = [layer.placement.scale for layer in model.model.layers]
    assert all(type(scale) is float for scale in scales)
    assert scales == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], abs=1e-15)
    assert not [name for name, _ in model.named_buffers() if "rotary" not in name]


def test_lns_has_the_initial_weights_and_keys_of_stock_llama():
    torch.manual_seed(3)
    stock = LlamaForCausalLM(LlamaConfig(**TEXT)).state_dict()
    torch.manual_seed(3)
    ours = CodLlamaForCausalLM(tiny_config("cod_llama", "lns")).state_dict()
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


def linear_stds(placement, **fields):
    """name of a Linear -> standard deviation of its weights, over layers of 128 x 128 and 128 x 192."""
    torch.manual_seed(0)
    big = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(tiny_config("cod_llama", placement, **{**big, **fields}))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears = [(name, m) for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
    return {n: torch.stack([m.weight for name, m in linears if name.endswith(n)]).std().item() for n in names}


@pytest.mark.parametrize("placement", ["pre", "post", "mix", "lns", "sandwich", "reordered"])
def test_plain_initialisation(placement):
    assert linear_stds(placement) == pytest.approx(dict.fromkeys(linear_stds(placement), 0.02), rel=0.02)


@pytest.mark.parametrize("fields", [{"placement": "scaled_init"}, {"placement": "mix", "scaled_residual_init": True}])
def test_scaled_initialisation(fields):
    expected = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0.02)
    expected |= dict.fromkeys(("o_proj", "down_proj"), 0.02 / math.sqrt(2 * N_LAYERS))
    assert linear_stds(**fields) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("beta", "gain"), [(None, (8 * N_LAYERS) ** -0.25), ((8 * N_LAYERS) ** 0.25, 32**0.25)])
def test_deepnorm_initialisation(beta, gain):
    attention, mlp = math.sqrt(2 / (128 + 128)), math.sqrt(2 / (128 + 192))
    expected = {"q_proj": attention, "k_proj": attention, "v_proj": gain * attention, "o_proj": gain * attention}
    expected |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), gain * mlp)
    assert linear_stds("deepnorm", deepnorm_beta=beta) == pytest.approx(expected, rel=0.02)


def test_deepnorm_gain_is_the_papers_unless_told():
    assert DeepNorm(tiny_config("cod_llama", "deepnorm"), 0).alpha == pytest.approx(8**0.25)
    assert DeepNorm(tiny_config("cod_llama", "deepnorm", deepnorm_alpha=8**0.5), 0).alpha == 8**0.5


def test_embeddings_head_and_norms_start_as_in_the_library():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("cod_llama", "deepnorm", hidden_size=256))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.embed_tokens.weight[1:].std().item() == pytest.approx(0.02, rel=0.05)
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    assert len(norms) == 2 * N_LAYERS + 1
    assert all((weight == 1).all() for weight in norms)


BAD = [
    ({"norm_placement": "keel"}, r"norm_placement: expected one of pre, post, .*reordered.*, got 'keel'"),
    ({"post_ln_fraction": 1.5}, r"post_ln_fraction: expected a number from 0 to 1, got 1.5"),
    ({"post_ln_fraction": -0.1}, r"post_ln_fraction: expected a number from 0 to 1, got -0.1"),
    ({"post_ln_fraction": math.nan}, r"post_ln_fraction: expected a number from 0 to 1, got nan"),
    ({"deepnorm_alpha": 0.0}, r"deepnorm_alpha: expected a number above 0"),
    ({"norm_placement": "deepnorm", "scaled_residual_init": True}, r"scaled_residual_init: expected False"),
    ({"norm_placement": 3}, r"norm_placement: expected one of pre, post, .*reordered.*, got 3"),
    ({"norm_placement": None}, r"norm_placement: expected one of pre, post, .*reordered.*, got None"),
    ({"norm_placement": ["lns"]}, r"norm_placement: expected one of pre, post, .*reordered.*, got \['lns'\]"),
    ({"post_ln_fraction": "0.5"}, r"post_ln_fraction: expected a number from 0 to 1, got '0.5'"),
    ({"post_ln_fraction": None}, r"post_ln_fraction: expected a number from 0 to 1, got None"),
    ({"post_ln_fraction": True}, r"post_ln_fraction: expected a number from 0 to 1, got True"),
    ({"deepnorm_beta": "1"}, r"deepnorm_beta: expected a number above 0, or None .* got '1'"),
    ({"scaled_residual_init": 1}, r"scaled_residual_init: expected True or False, got 1"),
    ({"gpas": "yes"}, r"gpas: expected True or False, got 'yes'"),
    ({"layer_scale": "1"}, r"layer_scale: expected a finite number or None, got '1'"),
    ({"layer_scale": math.inf}, r"layer_scale: expected a finite number or None, got inf"),
    ({"layer_scale": 1.0, "norm_placement": "post"}, r"layer_scale: expected None with norm_placement='post', got 1.0"),
    ({"lns_exponent": 1.5}, r"lns_exponent: expected a number from 0 to 1, got 1.5"),
    ({"lns_exponent": None}, r"lns_exponent: expected a number from 0 to 1, got None"),
    ({"lns_exponent": 0.2, "norm_placement": "pre"}, r"lns_exponent: expected 0.5 with norm_placement='pre', got 0.2"),
    ({"original_num_hidden_layers": 8}, r"original_num_hidden_layers: expected None without layer_depths, got 8"),
    ({"original_num_hidden_layers": 0}, r"original_num_hidden_layers: expected a whole number above 0 or None, got 0"),
    ({"original_num_hidden_layers": "8"}, r"original_num_hidden_layers: expected a whole number .* got '8'"),
    ({"original_num_hidden_layers": True}, r"original_num_hidden_layers: expected a whole number .* got True"),
    ({"layer_depths": "0123"}, r"layer_depths: expected a list of whole numbers or None, got '0123'"),
    ({"layer_depths": 4}, r"layer_depths: expected a list of whole numbers or None, got 4"),
    ({"layer_depths": [0, 1.5, 2, 3]}, r"layer_depths: expected a list of whole numbers or None, got \[0, 1.5, 2, 3\]"),
    ({"cod_code_version": "1"}, r"cod_code_version: expected a whole number, got '1'"),
    ({"cod_code_version": None}, r"cod_code_version: expected a whole number, got None"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads: expected a divisor of num_attention_heads, 4, got 3"),
    ({"num_key_value_heads": 8}, r"num_key_value_heads: expected a divisor of num_attention_heads, 4, got 8"),
    ({"layer_depths": [0, 1]}, r"layer_depths: expected one entry for each of the 4 layers, got 2"),
    ({"layer_depths": [0, 1, 2, 9], "original_num_hidden_layers": 8}, r"layer_depths: expected numbers from 0"),
    ({"layer_depths": [0, 1, 2, 3]}, r"layer_depths: expected numbers from 0 .* original_num_hidden_layers=None"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_say_what_is_valid(fields, message):
    with pytest.raises(ValueError, match=message):
        CodLlamaConfig(**{**TEXT, **fields})


def test_families_whose_default_heads_do_not_fit():
    with pytest.raises(ValueError, match="num_key_value_heads: expected a divisor of num_attention_heads, 8, got 32"):
        AutoConfig.for_model("cod_qwen3", num_attention_heads=8)


@pytest.mark.parametrize("placement", ["pre", "lns", "mix", "post"])
def test_placement_that_a_family_cannot_have(placement):
    with pytest.raises(ValueError, match=r"one of reordered, sandwich, got .* CodOlmo2Config does not support"):
        CodOlmo2Config(norm_placement=placement)


def test_field_changed_after_the_config_was_made_is_checked_by_the_model():
    config = tiny_config("cod_llama", "pre")
    config.norm_placement = "nowhere"
    with pytest.raises(ValueError, match="norm_placement: expected one of"):
        CodLlamaForCausalLM(config)


def test_warning_for_lns_with_scaled_initialisation():
    with pytest.warns(UserWarning, match="weakens LayerNorm Scaling") as caught:
        CodLlamaConfig(**TEXT, scaled_residual_init=True)
    assert [warning.filename for warning in caught] == [__file__]


def test_no_advice_on_training_for_a_finished_checkpoint(tmp_path, recwarn):
    model = tiny_model("cod_llama", "lns", scaled_residual_init=True)
    model.save_pretrained(tmp_path)
    recwarn.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.scaled_residual_init
    assert not [warning for warning in recwarn if "weakens" in str(warning.message)]


@pytest.mark.parametrize(
    ("version", "mend"), [(99, "upgrade with  pip install -U hf_cod"), (0, "install the earlier version of hf_cod")]
)
@pytest.mark.parametrize("trust", [False, True])
def test_warning_for_a_model_of_other_code(version, mend, trust, tmp_path):
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "cod_code_version": version}))
    with pytest.warns(
        UserWarning, match=f"saved by version {version} of the model code, and the installed version 2 .*{mend}"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)


def test_no_warning_for_a_model_of_this_code(tmp_path, recwarn):
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [warning for warning in recwarn if "model code" in str(warning.message)]


def test_one_layer():
    for placement in PLACEMENTS:
        model = tiny_model("cod_llama", placement, num_hidden_layers=1)
        weights = dict(model.named_parameters())
        expected = references.language_model(weights, "llama", model.config.to_dict(), tokens(), 1)
        assert (model(tokens()).logits - expected).abs().max() <= 1e-5


def test_layers_keep_their_depth_when_others_go():
    model = tiny_model("cod_llama", "lns")
    whole = copy.deepcopy(model)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 2, 3)])
    assert [layer.placement.depth for layer in model.model.layers] == [0, 2, 3]
    assert isinstance(model.model.layers[1].placement, LayerNormScaling)
    x = torch.randn(1, 3, 32)
    position = model.model.rotary_emb(x, torch.arange(3)[None])
    same = whole.model.layers[2](x, position_embeddings=position)
    assert torch.equal(model.model.layers[1](x, position_embeddings=position), same)
