"""Heads and channels that are found by measurement: fewer of them equal zeroed ones, on every kind of layer."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_cod import WidthPlan, drop, find_decoder_layers, narrow, plan_width
from hf_cod.layers.unit_discovery import find_all_units, find_units
from tests.fresh_processes import run_fresh
from tests.tiny_models import build, build_mixture, outputs, two_batches

# Type of transformers -> what it stands for. The check compares a narrower model with one of zeros, reloads it, and
# generates with and without a cache.
KINDS = {
    "gpt_neox": "queries, keys and values of a head are neighbours, attention and MLP are parallel",
    "gptj": "parallel, the number of heads is an attribute",
    "codegen": "fused matrices in blocks",
    "falcon": "keys and values of one head for all, a subclass of Linear",
    "gpt_bigcode": "blocks of queries, and one key and value for all",
    "starcoder2": "biases",
    "persimmon": "norms of a head beside fused matrices",
    "olmo2": "norms over all heads",
    "bitnet": "norms over all channels",
    "minicpm3": "latent attention",
    "granite_swa": "a parameter with a number for each head",
    "moshi": "a matrix inside a module, a fused gated MLP",
    "openai-gpt": "the number of heads has a name of its own",
    "phi3": "the number of heads is read from the config each time",
    "xglm": "a view to the width of the hidden state",
    "big_bird": "a module that the forward replaces",
}
# Of these, the tests run by default.
FAST = ("gpt_neox", "falcon", "olmo2", "minicpm3", "granite_swa", "phi3", "xglm", "big_bird")


@pytest.fixture(scope="module")
def examples():
    """The modules of the sweep of architectures, by name; its server ends with the tests of this file."""
    folder = str(Path(__file__).parents[2] / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module
        importlib.import_module("architecture_reload").stop_server()
    for name in [name for name, m in sys.modules.items() if folder in str(getattr(m, "__file__", None))]:
        if "." not in name:
            del sys.modules[name]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in KINDS]
)
def test_fewer_units_equal_zeroed_ones_after_a_reload_and_with_a_cache(kind, examples):
    told = examples("architecture_checks").check_narrow(examples("tiny_architectures").Case(kind))
    assert (told is None) == (kind != "big_bird")


def grouped_falcon():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
    }
    return FalconForCausalLM(FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2)).eval()


def wide_codegen():
    """Four blocks, each with the queries, values and keys of two heads."""
    from transformers import CodeGenConfig, CodeGenForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
    return CodeGenForCausalLM(CodeGenConfig(**sizes)).eval()


@pytest.mark.parametrize("made, count, heads", [(grouped_falcon, 2, 2), (wide_codegen, 4, 2)])
def test_heads_that_cannot_be_parted_go_together(made, count, heads, examples):
    units = find_units(find_decoder_layers(made()), 0)["heads"]
    assert (units.count, units.heads) == (count, heads)
    case = type("Made", (examples("tiny_architectures").Case,), {"build": lambda self, seed=0: made()})("falcon")
    assert examples("architecture_checks").check_narrow(case) is None


def test_layers_with_numbers_of_their_own_in_the_config(tmp_path):
    """Gemma's `per_layer_config`: transformers raises where the number of all layers is read."""
    from transformers import AutoModel

    from examples.tiny_architectures import tiny_config

    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("embedding_gemma2_text")).eval()
    narrow(model, WidthPlan(0.8, [2, 2, 2, None], [48] * 4, "mine"), "magnitude", "none")
    assert [layer.self_attn.q_proj.out_features for layer in model.layers[:3]] == [16] * 3
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path)(input_ids=ids).last_hidden_state
        assert torch.equal(again, model(input_ids=ids).last_hidden_state)


class Interleaved(nn.Module):
    """An attention of no family: one matrix, in which a head has its values, keys, queries and gates in turn."""

    def __init__(self, biased_heads=False):
        super().__init__()
        self.head_dim = 8
        self.everything = nn.Linear(32, 4 * 32)
        self.back = nn.Linear(32, 32)
        self.biased_heads = biased_heads

    def forward(self, hidden_states, **kwargs):
        parts = self.everything(hidden_states).unflatten(-1, (-1, 8, 4)).transpose(1, 2)
        v, k, q, gate = parts.unbind(-1)
        scores = q @ k.mT / 8**0.5
        if self.biased_heads:
            scores = scores * torch.arange(1.0, scores.shape[1] + 1)[:, None, None]
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v * gate.sigmoid()
        return self.back(out.transpose(1, 2).flatten(2)), None


@pytest.fixture
def with_attention(monkeypatch):
    """Makes Llamas with an attention of no family."""

    def made(**options):
        name = "transformers.models.llama.modeling_llama.LlamaAttention"
        monkeypatch.setattr(name, lambda config, layer_idx: Interleaved(**options))
        return build("llama")

    return made


def test_an_attention_of_no_family(with_attention, tmp_path):
    model, intact = with_attention(), with_attention()
    assert plan_width(model, 0.6, channel_multiple=8).heads != [4] * 4
    narrow(model, WidthPlan(0.6, [2] * 4, [None] * 4, "mine"), "magnitude", "none")
    with torch.no_grad():
        for layer, less in zip(intact.model.layers, model.model.layers, strict=True):
            whole, kept = layer.self_attn.back.weight, less.self_attn.back.weight
            gone = [head for head in range(4) if not any(torch.equal(whole[:, 8 * head], c) for c in kept.T)]
            assert len(gone) == 2
            for head in gone:
                whole[:, 8 * head : 8 * head + 8] = 0
    torch.testing.assert_close(outputs(model), outputs(intact))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(model))


def test_modules_that_a_reloaded_model_lacks_are_excluded():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = Interleaved()
    with pytest.raises(ValueError, match=r"got none; .*a reloaded model cannot have fewer \(ValueError: module_shapes"):
        narrow(model, 0.8, "magnitude", "none", channel_multiple=8)


def test_heads_that_differ_by_their_number_are_excluded(with_attention):
    model = with_attention(biased_heads=True)
    report = narrow(model, 0.8, "magnitude", "none", channel_multiple=8)
    assert report.results["heads"] == [None] * 4
    (note,) = report.notes
    assert note.startswith("layers 0 to 3: attention is not narrowed: with fewer heads its outputs differ by ")


def alibi_falcon():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, alibi=True)).eval()


GIVEN, TABLE = (
    "the model gives it a tensor with one entry for each head",
    "it has a table with one entry for each head",
)


@pytest.mark.parametrize(
    "kind, reasons",
    [
        ("bloom", {"layers 0 to 3": GIVEN}),  # samples and heads on one axis
        ("mpt", {"layers 0 to 3": GIVEN}),
        ("alibi_falcon", {"layers 0 to 3": GIVEN}),
        ("seq2seq/t5", {"layer 0": TABLE, "layers 1 to 3": GIVEN}),  # the table's entries are handed on
    ],
)
def test_positions_by_head_are_excluded_with_the_reason(kind, reasons, examples):
    model = alibi_falcon() if kind == "alibi_falcon" else examples("tiny_architectures").build(kind)
    report = narrow(model, 0.8, "magnitude", "none", channel_multiple=8)
    found = [note for note in report.notes if "attention" in note]
    assert found == [f"{layers}: attention is not narrowed: {reason}" for layers, reason in reasons.items()]
    assert all(kept < 128 for kept in report.results["channels"])


@pytest.mark.parametrize("kind", ["umt5", "t5"])
def test_different_parts_of_a_layer_in_a_list(kind, examples):
    """Only UMT5 has heads that no position bias counts: those of its cross-attention."""
    case = examples("tiny_architectures").Case(f"seq2seq/{kind}")
    layers = find_all_units(find_decoder_layers(case.build()))
    assert all(layer["channels"] and (layer["heads"] is not None) == (kind == "umt5") for layer in layers)
    told = examples("architecture_checks").check_narrow(case)
    assert told is None if kind == "umt5" else TABLE in told


@pytest.mark.parametrize("kind, needs_batches", [("qwen3_vl", False), ("gemma4", True)])
def test_towers_that_do_not_run_on_text(kind, needs_batches, examples):
    """They have no samples in their hidden states, or take images in a form of their own."""
    case = examples("tiny_architectures").Case(f"vision-language/{kind}+images@vision")
    if needs_batches:
        with pytest.raises(ValueError, match="no input is known on which it runs; narrow takes it from batches"):
            narrow(case.build(), 0.85, "magnitude", "none", channel_multiple=8, layers_path=case.stack)
    batches = examples("architecture_inputs").batches_for(case, case.build()) if needs_batches else None
    for layer in find_all_units(find_decoder_layers(case.build(), case.stack), batches):
        assert [units.kind for units in layer.found] == ["heads", "channels"] and layer["heads"].count > 1
    assert examples("architecture_checks").check_narrow(case) is None


def test_numbers_that_a_module_reads_from_its_config(examples, tmp_path):
    """Each attention then has a view of the config with its own numbers; whatever else is set later is seen in it."""
    model = examples("tiny_architectures").build("phi3")
    plan = WidthPlan(0.7, [2, 4, 2, 4], [48] * 4, "mine")
    report = narrow(model, plan, "magnitude", "none")
    assert not report.notes and model.config.num_attention_heads == 4
    assert model.config.module_shapes["layers.0.self_attn"]["config.num_attention_heads"] == 2
    batch = {"input_ids": torch.arange(3, 12)[None]}
    expected = outputs(model, batch)
    drop(model, 1)
    narrower, dropped = copy.deepcopy(model), outputs(model, batch)
    assert not torch.equal(dropped, expected)
    model.save_pretrained(tmp_path)
    for found in (type(model).from_pretrained(tmp_path), narrower):
        assert torch.equal(outputs(found, batch), dropped)
        found.set_attn_implementation("eager")
        attention = found.model.layers[0].self_attn
        assert attention.config.num_attention_heads == 2 and attention.config.num_hidden_layers == 3
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(outputs(loaded, batch), dropped)


def test_measuring_changes_nothing():
    model = build("olmo2").bfloat16().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_width(model, 0.7, channel_multiple=8)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.process
def test_norms_over_heads_in_a_fresh_process(tmp_path):
    """Layers of different widths, whose norms have as many weights as their heads."""
    model = build("olmo2")
    narrow(model, WidthPlan(0.7, [2, 4, 2, 4], [24, 40, 48, 16], "mine"), batches=two_batches(model))
    assert model.config.module_shapes["layers.0.self_attn.q_norm"] == {"weight": 16}
    model.save_pretrained(tmp_path)
    code = (
        "import torch, hf_cod\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "ids = torch.arange(3, 12)[None]\n"
        "options = {'max_new_tokens': 8, 'do_sample': False, 'eos_token_id': None}\n"
        "assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))\n"
        "torch.save(model(ids).logits.detach(), 'logits.pt')\n"
    )
    done = run_fresh(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = outputs(model, {"input_ids": torch.arange(3, 12)[None]})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_queries_that_share_all_keys_and_values_are_no_channels():
    """Their number is one that attention kernels count with; in a mixture no MLP comes before them."""
    for layer in find_all_units(find_decoder_layers(build_mixture("mixtral", num_key_value_heads=1))):
        assert [units.kind for units in layer.found] == ["expert_channels"]
        assert layer.whole == ["attention is not narrowed: no matrix has columns that belong to single heads"]
