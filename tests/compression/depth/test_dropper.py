import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_cod.compression.depth.dropper
import hf_cod.layers.removal.arranging
from examples.tiny_architectures import build as build_type
from hf_cod import drop, drop_layers, find_decoder_layers, perplexity, plan_depth, prune, skip
from hf_cod.compression.depth.replacement import BlockReplacer, blocks_of
from hf_cod.functional.linear_map import DAMPING, MapSums
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import SampleSettings, split_samples, token_batches
from hf_cod.models import PLACEMENTS, CodLlamaConfig, CodLlamaForCausalLM
from tests.compression.depth.references import linear_map, loss_without, with_map
from tests.fresh_processes import run_fresh
from tests.references import without_layer
from tests.tiny_models import batch_for, build

# Family -> the last matrix of a layer, whose output is added as it is.
ADDED = {
    "llama": "mlp.down_proj",
    "qwen3": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    "deepseek_v3": "mlp.shared_experts.down_proj",
}
# Norms behind the last matrix, banks of experts, or a gate behind the shared one.
NOT_ADDED = ["olmo2", "gemma3", "mixtral", "qwen2_moe", "bert"]


def batches_of(model, padding="left"):
    return [batch_for(model, padding), {name: tensor[:2] for name, tensor in batch_for(model).items()}]


@torch.no_grad()
def outputs(model, batch):
    return model.eval()(**batch).to_tuple()[0]


def path_of(model, layer, name):
    return f"{find_decoder_layers(model).layers_path}.{layer}.{name}"


@pytest.mark.parametrize("family", ADDED)
def test_maps_against_least_squares_one_behind_the_other(family):
    # transformers' product of experts knows no float64.
    dtype, error = (torch.float32, 1e-3) if family == "deepseek_v3" else (torch.float64, 1e-6)
    model = build(family, layers=6, dtype=dtype)
    batches, intact = batches_of(model), copy.deepcopy(model)
    first, second = path_of(model, 0, ADDED[family]), path_of(model, 2, ADDED[family])
    if family == "deepseek_v3":  # its layers 0 and 1 are dense
        first = path_of(model, 0, "mlp.down_proj")
    shortened = without_layer(intact, 1)
    shortened = with_map(shortened, first, linear_map(intact, shortened, [1], first, batches, DAMPING))
    for layer in (3, 4):
        shortened = without_layer(shortened, layer)
    shortened = with_map(shortened, second, linear_map(intact, shortened, [3, 4], second, batches, DAMPING))
    report = drop_layers(model, [1, 3, 4], "linear", batches=batches)
    told = report.results["replacements"]
    assert [(entry["layers"], entry["matrix"], entry["used"]) for entry in told] == [
        ([1], first, True),
        ([3, 4], second, True),
    ]
    assert all(0 < entry["explained"] < 1 for entry in told) and not report.notes
    mask = batches[0]["attention_mask"].bool()
    expected = outputs(shortened, batches[0])
    torch.testing.assert_close(outputs(model, batches[0])[mask], expected[mask], rtol=error, atol=error)


def test_a_map_explains_what_it_says():
    model = build("llama", dtype=torch.float64)
    batches = batches_of(model, None)
    _, _, T, explained = BlockReplacer(find_decoder_layers(model), [2], batches).fit(blocks_of([2])[0])
    name = path_of(model, 1, "mlp.down_proj")
    torch.testing.assert_close(T, linear_map(model, model, [2], name, batches, DAMPING), rtol=1e-8, atol=1e-9)
    lost = kept = 0.0
    for batch in batches:
        states = {}
        for key, form in (("plain", model), ("mapped", with_map(model, name, T))):
            with torch.no_grad():
                states[key] = form(**batch, output_hidden_states=True).hidden_states
        lost += float((states["plain"][3] - states["mapped"][2]).square().sum())
        kept += float((states["plain"][3] - states["plain"][2]).square().sum())
    assert 1 - lost / kept == pytest.approx(explained, rel=1e-6)


def test_differences_of_hidden_states_are_not_rounded(monkeypatch):
    model, found = build("llama", dtype=torch.bfloat16), []
    monkeypatch.setattr(MapSums, "add", lambda self, m, r: found.append(r))
    monkeypatch.setattr(MapSums, "solve", lambda self, damping: (None, 0.0))
    batch = batch_for(model)
    BlockReplacer(find_decoder_layers(model), [1, 2], [batch]).fit(blocks_of([1, 2])[0])
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(found[0], (states[3].double() - states[1].double()).flatten(0, 1))


@pytest.mark.parametrize("family", NOT_ADDED)
def test_families_without_such_a_matrix_say_why_and_are_dropped_plainly(family):
    model, plain = build(family), build(family)
    batch = batch_for(model)
    report = drop_layers(model, [3], "linear", batches=[batch])
    drop(plain, [3])
    assert torch.equal(outputs(model, batch), outputs(plain, batch))
    assert report.results["replacements"] == [] and len(report.notes) == 1
    assert report.notes[0].startswith("no linear map replaces layer 3: ")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_norm_placement_keeps_its_depth_and_reloads(placement, tmp_path):
    config = CodLlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4,
        norm_placement=placement, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = CodLlamaForCausalLM(config).eval()
    report = drop_layers(model, [2], "linear", batches=batches_of(model))
    assert bool(report.results["replacements"]) != bool(report.notes)
    if placement in ("pre", "lns"):
        assert report.results["replacements"]
    if placement in ("post", "deepnorm", "sandwich"):
        assert "is not added unchanged to the hidden state" in report.notes[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = batch_for(model)
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch), atol=1e-6, rtol=1e-5)


def test_measured_keeps_what_lowers_the_loss_and_nothing_else():
    model = build("llama", layers=6)
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(3, 99, (4, 16), generator=generator)} for _ in range(3)]
    batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    intact = copy.deepcopy(model)
    report = drop_layers(model, [1, 3, 5], "measured", batches=batches)
    told = report.results["replacements"]
    assert [entry["used"] for entry in told] == [e["loss"]["linear"] < e["loss"]["plain"] for e in told]
    _, unseen = split_samples(batches, 9)
    assert told[0]["loss"]["plain"] == pytest.approx(loss_without(intact, [1, 3, 5], unseen), abs=1e-5)
    least = min(min(entry["loss"].values()) for entry in told)
    assert loss_without(model, [], unseen) == pytest.approx(least, abs=1e-5)
    again, unlike = copy.deepcopy(intact), copy.deepcopy(intact)
    with torch.no_grad():  # layer 1 now adds nothing, so that no map can help, and noise can harm
        for form in (again, unlike):
            form.model.layers[1].mlp.down_proj.weight.zero_()
            form.model.layers[1].self_attn.o_proj.weight.zero_()
    entry = drop_layers(again, [1], "measured", batches=batches).results["replacements"][0]
    assert not entry["used"] and entry["explained"] == pytest.approx(0, abs=1e-9)
    drop(unlike, [1])
    assert torch.equal(outputs(again, batches[0]), outputs(unlike, batches[0]))


@pytest.mark.process
def test_stock_transformers_loads_the_result_in_a_fresh_process(tmp_path):
    model = build("llama_tied")
    batches = batches_of(model)
    plan = plan_depth(model, 2, "layer_drop", batches=batches, protect=[0])
    report = drop_layers(model, plan, "linear", batches=batches)
    assert report.results["replacements"] and report.results["removed"] == plan.layers
    assert report.layers["cost"] == plan.costs and sum(report.layers["removed"]) == 2
    assert report.results["parameters"]["dropped"] == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('.').eval()\n"
        "assert type(model).__name__ == 'LlamaForCausalLM' and 'hf_cod' not in sys.modules\n"
        "ids = torch.arange(3, 12)[None]\n"
        "torch.save(model(ids).logits.detach(), 'logits.pt')\n"
        "assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 12\n"
    )
    done = run_fresh(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), outputs(model, {"input_ids": torch.arange(3, 12)[None]}))


def test_zeros_of_a_pruned_model_stay():
    model = build("llama", layers=6)
    prune(model, 0.5, "magnitude")
    whole = build("llama", layers=6)
    masks = [p == 0 for layer in (0, 2, 3, 4, 5) for p in model.model.layers[layer].parameters()]
    report = drop_layers(model, 1, "linear", batches=batches_of(model))
    assert "fill the zeros of model.layers.0.mlp.down_proj of layer 0, which is pruned" in report.notes[0]
    left = [p == 0 for layer in model.model.layers for p in layer.parameters()]
    assert all(map(torch.equal, left, masks))
    assert drop_layers(whole, 1, "linear", batches=batches_of(whole)).results["replacements"][0]["used"]


def test_what_is_added_is_found_out_in_float16_too():
    """Norms of large hidden states are above what float16 can say."""
    model = build("olmo2", dtype=torch.float16)
    model.model.layers[0].post_feedforward_layernorm.weight.data.fill_(10_000)
    report = drop_layers(model, 1, "linear", batches=batches_of(model))
    assert "is not added unchanged to the hidden state" in report.notes[0] and not report.results["replacements"]


def test_a_model_that_adds_tokens_inside():
    """CPM-Ant puts prompts before the text: without padding all its tokens count."""
    model = build_type("cpmant")
    ids = torch.randint(5, 80, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    report = drop_layers(copy.deepcopy(model), [2], "linear", batches=[batch])
    assert report.results["replacements"][0]["used"]
    batch["attention_mask"][0, :3] = 0
    report = drop_layers(model, [2], "linear", batches=[batch])
    assert "got 27; use samples without padding" in report.notes[0] and not report.results["replacements"]


def test_nothing_stands_in_front_of_layer_0():
    model = build("llama")
    report = drop_layers(model, [0, 2], "linear", batches=batches_of(model))
    assert report.notes == ["no linear map replaces layer 0: there is no layer before it"]
    assert [entry["layers"] for entry in report.results["replacements"]] == [[2]]


def test_adapters_are_kept_where_nothing_is_folded():
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config)
    batch = batch_for(build("llama"))
    with skip(model, [1]):
        expected = outputs(model, batch)
    report = drop_layers(model, [1], "linear", batches=[batch])
    assert "got an adapter at model.layers.0" in report.notes[0] and not report.results["replacements"]
    assert torch.equal(outputs(model, batch), expected)


def test_what_cannot_be_measured_is_dropped_plainly():
    headless, model = build("bert_headless"), build("llama")
    one = [{name: tensor[:1] for name, tensor in batch_for(model).items()}]
    for form, batches, why in [
        (headless, batches_of(headless), "BertModel has no loss of its own"),
        (model, one, "at least two samples are required"),
    ]:
        report = drop_layers(form, [1], "measured", batches=batches)
        assert why in report.notes[0] and not report.results["replacements"]
        assert len(find_decoder_layers(form)) == 3


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = build("llama", layers=6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit, done = BlockReplacer.fit, []

    def fails(self, block):
        done.append(block)
        if len(done) == 2:
            raise KeyboardInterrupt
        return fit(self, block)

    monkeypatch.setattr(BlockReplacer, "fit", fails)
    with pytest.raises(KeyboardInterrupt):
        drop_layers(model, [1, 3], "linear", batches=batches_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and len(done) == 2
    monkeypatch.undo()
    end = "check_config_builds"  # the last that `drop` does
    monkeypatch.setattr(hf_cod.layers.removal.arranging, end, lambda *_: pytest.fail("on the way"))
    monkeypatch.setattr(hf_cod.compression.depth.dropper, "check_drop", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        drop_layers(model, [1, 3], "linear", batches=batches_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_bad_input_changes_nothing():
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for layers, more, message in [
        ([], {}, r"layers: expected 1..3 of 4 layers to remove, got 0"),
        ([0, 1, 2, 3], {}, r"layers: expected 1..3 of 4 layers to remove, got 4"),
        ([4], {}, r"layers: expected indices from 0 to 3 in ascending order, got \[4\]"),
        ([1, 1], {}, r"layers: expected indices from 0 to 3 in ascending order, got \[1, 1\]"),
        ([1], {"replacement": "best"}, "replacement: expected one of none, linear, measured, got 'best'"),
        (
            [1],
            {"replacement": "linear"},
            "batches: expected batches, or tokenizer and texts, for replacement linear, got neither",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            drop_layers(model, layers, **more)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_real_model_without_one_layer(smollm2, brown_text):
    """Layer 11, where massive activations arise, is protected, though its block influence is low."""
    model, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
    settings = SampleSettings(sequence_length=96, max_samples=5, batch_size=4)
    batches, unseen = split_samples(token_batches(tokenizer, brown_text[:1_000_000], settings), 3)
    plan = plan_depth(model, 5, "block_influence", batches=batches)
    assert 11 in plan.protected and 11 not in plan.layers and len(plan.protected) <= 3
    intact = perplexity(model, unseen)
    report = drop_layers(model, plan, "linear", batches=batches)
    assert report.results["replacements"] and not report.notes
    assert intact < perplexity(model, unseen) < 10 * intact
