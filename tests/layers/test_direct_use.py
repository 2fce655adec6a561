"""Matrices that a model uses other than by calling their module: found whatever the model does with them."""

import copy

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from hf_cod import OwlBnbConfig, drop, factorize, find_decoder_layers, pack_sparse, prune, quantize
from hf_cod.layers.direct_use import READ, UNCALLED, check_unwritten, direct_use
from tests.tiny_models import batch_for, build, outputs

WIDTH = 16
_COMMON = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HYBRID = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "mamba_dt_rank": 16,
    "mamba_d_state": 8,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
_RWKV = {"hidden_size": 32, "intermediate_size": 64, "attention_hidden_size": 32, "num_hidden_layers": 4}
FAMILIES = {
    "t5": (AutoModelForSeq2SeqLM, "t5", _T5),
    "umt5": (AutoModelForSeq2SeqLM, "umt5", _T5),
    "mamba": (AutoModelForCausalLM, "mamba", {"hidden_size": 32, "num_hidden_layers": 2, "time_step_rank": 16}),
    "jamba": (AutoModelForCausalLM, "jamba", {**_HYBRID, "num_hidden_layers": 4}),
    "rwkv": (AutoModelForCausalLM, "rwkv", {**_RWKV, "rescale_every": 2, "attention_hidden_size": 32}),
    "falcon": (
        AutoModelForCausalLM,
        "falcon",
        {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_hidden_size": 48},
    ),
}
USED_IN_LAYERS = {"t5": "wo", "mamba": "dt_proj", "jamba": "dt_proj"}
USED = {"t5": "wo", "umt5": "wo", "mamba": ("dt_proj", "lm_head"), "jamba": "dt_proj"}


def family(name, device="cpu"):
    auto, kind, values = FAMILIES[name]
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(CONFIG_MAPPING[kind](**_COMMON, **values)).eval()


class Block(nn.Module):
    """Two matrices; `use` says what the forward does with `second`."""

    def __init__(self, use, kind=nn.Linear):
        super().__init__()
        self.first, self.second, self.use = nn.Linear(WIDTH, WIDTH), kind(WIDTH, WIDTH), use

    def forward(self, x):
        return self.use(self, self.first(x))


class Model(nn.Module):
    """A transformers model as far as the pass requires; only the first `running` blocks run."""

    main_input_name = "input_ids"

    def __init__(self, use, kind=nn.Linear, running=2):
        super().__init__()
        self.embedding = nn.Embedding(99, WIDTH)
        self.blocks = nn.ModuleList(Block(use, kind) for _ in range(2))
        self.head = nn.Linear(WIDTH, 99, bias=False)
        self.head.weight = self.embedding.weight
        self.running, self.scaled = running, False

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks[: self.running]:
            x = block(x)
        return self.head(x)


class OwnForward(nn.Linear):
    """Reads its weight in its own forward, as Falcon's Linear."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("first", "second")]


def casts(block, x):
    return block.second(x.to(block.second.weight.dtype))


def multiplies(block, x):
    return x @ block.second.weight.T


def joins(block, x):
    return nn.functional.linear(x, torch.cat([block.first.weight, block.second.weight]))[..., :WIDTH]


def by_name(block, x):
    return x @ block.second.weight.data.T


def by_long_inputs(block, x):
    return x @ block.second.weight.T if x.shape[1] > 32 else block.second(x)


def by_its_state(block, x):
    return block.second(x) * block.state_dict()["second.weight"].std()


def by_its_parameters(block, x):
    return x @ dict(block.second.named_parameters())["weight"].T


def by_the_first_parameter(block, x):
    return x @ next(block.second.parameters()).T


def by_the_dictionary(block, x):
    return block.second(x) * block.second._parameters.get("weight").std()


def by_the_values(block, x):
    return block.second(x) * next(iter(block.second._parameters.values())).std()


def moves(block, x):
    block.to(x.dtype).second.to(x.device)
    return block.second(x)


def calls(block, x):
    return block.second(x)


@pytest.mark.parametrize(
    "use, kind, expected",
    [
        (calls, nn.Linear, {}),
        (calls, OwnForward, {}),
        (calls, Conv1D, {}),
        (moves, nn.Linear, {}),
        (casts, nn.Linear, {"second": READ}),
        (multiplies, nn.Linear, {"second": UNCALLED}),
        (multiplies, Conv1D, {"second": UNCALLED}),
        (by_name, OwnForward, {"second": UNCALLED}),
        (joins, nn.Linear, {"first": READ, "second": UNCALLED}),
        (by_long_inputs, nn.Linear, {"second": UNCALLED}),
        (by_its_state, nn.Linear, {"first": READ, "second": READ}),
        (by_its_parameters, nn.Linear, {"second": UNCALLED}),
        (by_the_first_parameter, Conv1D, {"second": UNCALLED}),
        (by_the_dictionary, nn.Linear, {"second": READ}),
        (by_the_values, OwnForward, {"second": READ}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_use_but_a_call_is_found(use, kind, expected, device):
    model = Model(use, kind).to(device)
    found = direct_use(model)
    assert found.failure is None and found.written == [] and found.notes([*NAMES]) == []
    assert found.reasons == {f"blocks.{i}.{name}": reason for i in range(2) for name, reason in expected.items()}


def test_what_did_not_run_is_like_what_ran():
    """An expert to which no token was routed."""
    assert direct_use(Model(casts, running=1)).reasons == {"blocks.0.second": READ, "blocks.1.second": READ}


def test_a_module_with_two_names():
    model = Model(calls)
    model.blocks[1].second = model.blocks[0].second
    assert direct_use(model).reasons == {}
    model = Model(casts)
    model.blocks[1].second = model.blocks[0].second
    assert direct_use(model).reasons == {"blocks.0.second": READ, "blocks.1.second": READ}


def scales(block, x):
    if not block.first.training and not getattr(block, "scaled", False):
        block.second.weight.mul_(2)
        block.scaled = True
    if block.first.training and getattr(block, "scaled", False):
        block.second.weight.div_(2)
        block.scaled = False
    return block.second(x)


def scales_data(block, x):
    block.second.weight.data *= 2
    return block.second(x)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("use", [scales, scales_data])
def test_a_model_that_changes_itself(use, before):
    """Found before its first forward pass, and after it, when nothing is left to change in eval mode."""
    model = Model(use).eval()
    for _ in range(before):
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.long))
    weights = copy.deepcopy(model.state_dict())
    assert {"blocks.0.second.weight", "blocks.1.second.weight"} == {*direct_use(model).written}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "a copy was changed"
    with pytest.raises(ValueError, match=r"stay the same in eval mode, got Model, whose forward changes blocks\.0"):
        check_unwritten(model)


def test_the_model_is_left_as_it_was():
    def keeps(block, x):
        block.cache = x
        return nn.functional.dropout(multiplies(block, x), 0.5, training=True)

    model = Model(keeps).train()
    model.blocks[1].eval()
    before = [(dict(vars(m)), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    state, seen = torch.get_rng_state(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(_))
    assert direct_use(model).reasons and not seen, "hooks of others see nothing"
    model.blocks[0]._forward_hooks.clear()
    assert torch.equal(torch.get_rng_state(), state)
    for module, (attributes, *others) in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys() and type(module._parameters) is dict
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert [module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks)] == others


def test_a_failed_pass_is_told_and_repeated_with_a_batch():
    def fails(block, x):
        if x.shape[1] != 3:
            raise TypeError("three tokens are required")
        return multiplies(block, x)

    model = Model(fails)
    found = direct_use(model)
    assert found.reasons == {} and "three tokens" in found.notes([*NAMES])[0]
    assert direct_use(model, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]).reasons.keys() == {
        "blocks.0.second",
        "blocks.1.second",
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "rwkv"])
def test_families(name, device):
    model = family(name, device)
    found = direct_use(model)
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(USED.get(name, "none"))}
    assert found.reasons.keys() == expected and found.written == [] and found.failure is None


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "qwen2_moe", "bert", "vit", "gpt_oss"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_families_have_none(kind, device):
    with torch.device(device):
        model = build(kind)
    found = direct_use(model)
    assert (found.reasons, found.written, found.failure) == ({}, [], None)


@pytest.mark.parametrize("name", ["t5", "mamba", "jamba"])
def test_quantized_models_compute_with_the_decoded_weights(name, tmp_path):
    model = family(name)
    report = quantize(model, OwlBnbConfig(bits=4))
    used = [n for n, m in model.named_modules() if n.endswith(USED[name]) and type(m) is nn.Linear]
    (told,) = [note for note in report.notes if "its weight" in note]
    left = [n for n in used if USED_IN_LAYERS[name] in n and n not in report.results["module_bits"]]
    assert left and USED_IN_LAYERS[name] in told
    model.save_pretrained(tmp_path)
    batch = {**batch_for(model), "decoder_input_ids": torch.ones(3, 4, dtype=torch.long)} if name == "t5" else None
    got = outputs(model, batch)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path), batch), got)
    torch.testing.assert_close(outputs(model.dequantize(), batch), got, atol=1e-4, rtol=1e-4)


def test_quantized_while_loading(tmp_path):
    family("mamba").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OwlBnbConfig(bits=4))
    mixer = find_decoder_layers(model)[0].mixer
    assert type(mixer.dt_proj) is nn.Linear and mixer.in_proj.bits == 4
    assert outputs(model).isfinite().all()


def test_factorized_pruned_and_packed(caplog):
    model = family("mamba")
    report = prune(model, 0.7, "wanda", batches=[batch_for(model)])
    assert f"backbone.layers.0.mixer.dt_proj is pruned by magnitude: {UNCALLED}" in report.notes
    pack_sparse(model)
    assert type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear
    assert f"backbone.layers.0.mixer.dt_proj is not packed: {UNCALLED}" in caplog.text
    model = family("mamba")
    report = factorize(model, 0.8, "plain")
    assert type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear
    assert f"backbone.layers.0.mixer.dt_proj is not factorized: {UNCALLED}" in report.notes


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: drop(model, 1),
        lambda model: pack_sparse(model, 0.0),
    ],
    ids=["drop", "pack_sparse"],
)
def test_rwkv_is_refused_and_left_as_it_was(change, evaluated):
    model = family("rwkv")
    logits = outputs(model)
    if not evaluated:
        model = family("rwkv")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Rwkv"):
        change(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model), logits)


class Tower(nn.Module):
    """Another class of blocks, so that nothing is known of them by those of the text."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.first(x) @ self.second.weight.T


class WithImages(Model):
    """Images run in a tower of their own."""

    def __init__(self):
        super().__init__(calls)
        self.tower = nn.ModuleList(Tower() for _ in range(2))

    def forward(self, input_ids, pixel_values=None):
        out = super().forward(input_ids)
        if pixel_values is not None:
            for block in self.tower:
                pixel_values = block(pixel_values)
            out = out + pixel_values.mean()
        return out


def test_what_did_not_run_is_named():
    """An input without images shows nothing of a vision tower; one with images adds to it, and is examined once."""
    model, tower = WithImages(), [f"tower.{i}.{name}" for i in range(2) for name in ("first", "second")]
    found = direct_use(model)
    assert found.reasons == {} and [*found.unseen] == tower
    assert found.notes(NAMES) == []
    (note,) = found.notes([*NAMES, *tower])
    assert "of 4 of 8 matrices that did not run on its input: tower.*.first (layers 0 to 1)" in note
    text = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert [*direct_use(model, [text]).unseen] == tower
    found = direct_use(model, [text | {"pixel_values": torch.ones(1, 3, WIDTH)}])
    assert found.reasons == {"tower.0.second": UNCALLED, "tower.1.second": UNCALLED} and [*found.unseen] == []
    assert direct_use(model) is found, "what images have shown is kept"


def test_reports_name_what_was_not_examined():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": 99, **sizes, "num_key_value_heads": 2}
    config = CONFIG_MAPPING["llava"](vision_config=vision, text_config=text, image_token_index=90)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert not [note for note in prune(model, 0.5, "magnitude").notes if "not checked" in note]
    (note,) = [note for note in prune(model, 0.5, "magnitude", layers_path="vision").notes if "not checked" in note]
    assert "of 12 of 12 matrices that did not run on its input: model.vision_tower" in note
