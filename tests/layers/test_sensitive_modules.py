"""Routers, gates of one row and latent projections: found without their names, left by `quantize`, included by name."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_cod import OwlBnbConfig, find_decoder_layers, plan_bits, quantize
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.sensitive_modules import GATE, LATENT, ROUTER, sensitive_modules
from tests.tiny_models import CAUSAL, build, build_encoder_decoder, two_batches

_MOE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
EXPECTED = {
    "deepseek_v3": {LATENT: ("q_a_proj", "kv_a_proj_with_mqa")},
    "qwen2_moe": {GATE: ("shared_expert_gate",)},
    "phimoe": {ROUTER: ("mlp.router",)},
    "jetmoe": {ROUTER: ("mlp.router.layer", "self_attention.experts.router.layer")},
}
# Norms over heads, norms behind sublayers, residuals of their own, one key and value head: nothing of these kinds.
NOTHING = [family for family in CAUSAL if family not in EXPECTED]


def family(name, device="cpu"):
    if name in CAUSAL:
        changes = {"q_lora_rank": 12, "kv_lora_rank": 8} if name == "deepseek_v3" else {}
        with torch.device(device):
            return build(name, **changes)
    more = {"kv_channels": 16} if name == "jetmoe" else {}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**_MOE, **more})).eval()


def found(model):
    stack = find_decoder_layers(model)
    return sensitive_modules(stack, direct_use(model).latent)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_are_found_by_structure(name, device):
    if (name, device) == ("jetmoe", "meta"):
        device = "cpu"  # its routing reads numbers
    model = family(name, device)
    names = [name for i in range(len(find_decoder_layers(model))) for name in find_decoder_layers(model).linears(i)]
    wanted = {each: kind for kind, ends in EXPECTED[name].items() for each in names if each.endswith(ends)}
    assert wanted and found(model) == wanted


@pytest.mark.parametrize("name", NOTHING)
def test_other_families_have_none(name):
    assert found(build(name)) == {}


class Latent(nn.Module):
    """In a family of other names: `way` is what is between the first matrix and the second."""

    def __init__(self, way):
        super().__init__()
        self.squash, self.even, self.widen, self.way = nn.Linear(16, 6), nn.LayerNorm(4), nn.Linear(4, 16), way

    def forward(self, x):
        latent = self.squash(x)[..., :4]
        match self.way:
            case "norm":
                return self.widen(self.even(latent))
            case "views":
                return self.widen(self.even(latent).view(1, *x.shape[:-1], 4))[0]
            case "sum":
                return self.widen(self.even(latent + x[..., :4]))
            case "no norm":
                return self.widen(latent)
            case "attention":
                weights = torch.softmax(self.even(latent) @ self.even(latent).mT, -1)
                return self.widen(weights @ self.even(latent))


@pytest.mark.parametrize(
    "way, expected", [("norm", True), ("views", True), ("sum", False), ("no norm", False), ("attention", False)]
)
def test_a_latent_projection_is_what_hands_its_output_through_a_norm(way, expected):
    model = build("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    for layer in model.model.layers:
        layer.mlp = Latent(way)
    names = {f"model.layers.{i}.mlp.squash" for i in range(4)}
    assert found(model) == (dict.fromkeys(names, LATENT) if expected else {})


# PhiMoE's router is excluded in any case: it computes something else than a Linear.
QUANTIZABLE = ["deepseek_v3", "qwen2_moe", "jetmoe"]


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_they_are_not_quantized_but_counted(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, original = family(name), family(name)
    report = quantize(model, bits=3, batches=two_batches(model))
    for kind, ends in EXPECTED[name].items():
        left = {n: m for n, m in original.named_modules() if n.endswith(ends)}
        assert left and not left.keys() & report.results["module_bits"].keys()
        assert all(torch.equal(model.get_submodule(n).weight, m.weight) for n, m in left.items())
        weights = sum(module.weight.numel() for module in left.values())
        note = next(note for note in report.notes if kind in note)
        assert note.startswith(f"{len(left)} matrices of {weights:,} weights not quantized") and ends[0] in note
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = two_batches(model)[1]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        # What stays dense may be loaded to another alignment, for which its sums are rounded otherwise.
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_experts_in_a_list_that_are_left_are_one_name():
    """Switch Transformers reads the dtype of `wo`, which bytes do not have."""
    model = build_encoder_decoder("switch_transformers")
    report = quantize(model, OwlBnbConfig(bits=3, block=32), layers_path="decoder")
    (note,) = [note for note in report.notes if "(the model reads its weight itself" in note]
    assert note.startswith("16 matrices of 49,152 weights are not quantized (the model reads ")
    assert note.endswith("): decoder.block.*.layer.2.mlp.experts.*.wo (layers 0 to 3)")
    stack = find_decoder_layers(model, "decoder")
    assert sum(stack.count_weights(index) for index in range(4)) == sum(report.layers["parameters"]) + 49_152 + 512


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_they_are_quantized_if_they_are_included_by_name(name):
    pytest.importorskip("bitsandbytes")
    model = family(name)
    (ends,) = EXPECTED[name].values()
    plan = plan_bits(model, 3, include=[ends[0]])
    assert len(plan.bits) == len([n for n in found(model) if n.endswith(ends[0])])
    report = quantize(model, bits=3, include=r".*", exclude=r".*\.(o_proj|kv_proj)")
    assert {n for n in report.results["module_bits"] if n.endswith(ends)} == found(family(name)).keys()
    assert not [n for n in report.results["module_bits"] if n.endswith((".o_proj", ".kv_proj"))]


def test_loading_leaves_them_and_says_so(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    family("deepseek_v3").save_pretrained(tmp_path / "dense")
    config = OwlBnbConfig(bits=3, exclude=["gate_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    modules = model.config.quantization_config.modules
    assert modules and not [n for n in modules if n.endswith((*EXPECTED["deepseek_v3"][LATENT], "gate_proj"))]
    assert "8 matrices of" in caplog.text and "kv_a_proj_with_mqa (layers 0 to 3)" in caplog.text
    model.save_pretrained(tmp_path / "stored")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert again.config.quantization_config.modules == modules
