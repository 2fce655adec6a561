"""Gemma 3n and 4 keep embeddings of all layers in one table: (words, depth * width), and project to (depth * width)."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

from examples.tiny_architectures import build, tiny_config
from hf_cod import drop, factorize, find_decoder_layers, repeat, skip
from hf_cod.layers.removal.arranging import arranged
from hf_cod.layers.removal.drop import check_drop
from tests.layers.removal.references import with_block

IDS = torch.arange(3, 12)[None]
TABLES = ("embed_tokens_per_layer", "per_layer_model_projection")
WIDTH = 8


def model_of(kind):
    """A model whose outputs depend on its tables: some weights of a new Gemma 3n are 0; its layers share no keys."""
    if kind == "gemma3n_text":
        config = tiny_config(kind)
        config.num_kv_shared_layers = 0
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    else:
        model = build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def tables_of(model):
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in TABLES}


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def with_layers_that_do_nothing(kind, removed):
    model = model_of(kind)
    stack = find_decoder_layers(model)
    for index in removed:
        stack[index].forward = lambda hidden, *_, **__: hidden
    return model


@pytest.mark.parametrize("removed", [[1], [0, 2]])
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "vision-language/gemma4"])
def test_the_blocks_of_removed_layers_are_left_out(kind, removed, tmp_path):
    model = model_of(kind)
    expected, intact, weights = output(with_layers_that_do_nothing(kind, removed)), output(model), [*model.parameters()]
    with skip(model, removed):
        torch.testing.assert_close(output(model), expected, atol=0, rtol=0)
        skipped = model.generate(IDS, max_new_tokens=8, do_sample=False)
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
    assert all(p is weight for p, weight in zip(model.parameters(), weights, strict=True))

    check_drop(model, removed)
    assert all(p is weight for p, weight in zip(model.parameters(), weights, strict=True))
    drop(model, removed)
    torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(loaded), expected, atol=1e-5, rtol=1e-5)
    for each in (model, loaded):
        embedding, projection = tables_of(each).values()
        assert embedding.embedding_dim == projection.out_features == (4 - len(removed)) * WIDTH
        assert embedding.weight.shape[1] == projection.weight.shape[0] == (4 - len(removed)) * WIDTH
        for cached in (True, False):
            assert torch.equal(each.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cached), skipped)


def test_skip_copies_no_table_and_comes_back_after_an_exception():
    model = model_of("gemma4_text")
    intact, weights = output(model), [m.weight for m in tables_of(model).values()]
    with pytest.raises(RuntimeError, match="in the block"), skip(model, 1):
        assert all(m.weight is weight for m, weight in zip(tables_of(model).values(), weights, strict=True))
        raise RuntimeError("in the block")
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)


def test_blocks_of_skipped_layers_have_no_gradient():
    model = model_of("gemma3n_text").train()
    with skip(model, [0, 2]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradient = tables_of(model)["model.embed_tokens_per_layer"].weight.grad.view(-1, 4, WIDTH).abs().sum((0, 2))
    assert (gradient > 0).tolist() == [False, True, False, True]


def test_factors_keep_their_shapes(tmp_path):
    """The config records the ranks of matrices by layer."""
    model = model_of("gemma3n_text")
    factorize(model, 0.6, "plain")
    intact = output(model)
    with skip(model, [0, 2]):
        expected = output(model)
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
    drop(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for each in (model, loaded):
        torch.testing.assert_close(output(each), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_kept():
    model = model_of("gemma3n_text").bfloat16().requires_grad_(False)
    with skip(model, [0, 3]):
        expected = output(model)
    drop(model, [0, 3])
    torch.testing.assert_close(output(model), expected)
    assert all(m.weight.dtype == torch.bfloat16 and not m.weight.requires_grad for m in tables_of(model).values())


def test_blocks_in_another_order_are_refused(monkeypatch):
    def across(self, input_ids):
        """All layers' first channels, then all layers' second ones."""
        found = self.embed_tokens_per_layer(input_ids)
        return found.unflatten(-1, (self.hidden_size_per_layer_input, -1)).transpose(-1, -2)

    monkeypatch.setattr(Gemma3nTextModel, "get_per_layer_inputs", across)
    model = model_of("gemma3n_text")
    intact, config = output(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"^layers: expected weights outside of the layers with one block for each"):
        drop(model, 1)
    with pytest.raises(ValueError, match="layer 0 gets other values"), skip(model, 1):
        pass
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
    assert model.config.to_dict() == config


def test_tables_that_cannot_be_cut_are_refused_before_anything_changes():
    adapted = get_peft_model(
        model_of("gemma3n_text"),
        LoraConfig(r=2, target_modules=["per_layer_model_projection"], init_lora_weights=False),
    )
    tied = model_of("gemma3n_text")
    tied.other = torch.nn.Embedding(99, 32)
    tied.other.weight = tied.model.embed_tokens_per_layer.weight
    for model, reason in ((adapted, "got an adapter"), (tied, "got weights that other.weight shares")):
        intact = output(model)
        for function in (drop, check_drop):
            with pytest.raises(ValueError, match=f"^model: expected plain weights in memory of .*{reason}"):
                function(model, 1)
        torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
        with skip(model, 1):
            assert not torch.equal(output(model), intact)


def test_skip_works_on_offloaded_tables():
    model = model_of("gemma4_text")
    with skip(model, 1):
        expected = output(model)
    cpu_offload(model, execution_device="cpu")
    with skip(model, 1):
        torch.testing.assert_close(output(model), expected, atol=0, rtol=0)


def test_a_table_that_the_model_does_not_run_stays_refused():
    """The input channels of ESM's contact head are all heads of all layers."""
    model = build("encoder/esm")
    intact = output(model)
    with pytest.raises(ValueError, match="weights outside of the layers that do not depend on their number"):
        drop(model, 1)
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_each_repetition_of_a_layer_has_its_block(kind):
    model = model_of(kind)
    expected = with_block(model, 1, 2, times=3)(input_ids=IDS, use_cache=False)[0]
    weights = {name: table.weight for name, table in tables_of(model).items()}
    with arranged(model, lambda stack: [0, 1, 1, 1, 2, 3], None):
        assert torch.equal(output(model), expected)
        assert all(table.weight is weights[name] for name, table in tables_of(model).items())
    repeat(model, 1, 2, times=3)
    assert torch.equal(output(model), expected)
