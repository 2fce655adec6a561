import copy
from contextlib import nullcontext
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.pytorch_utils import Conv1D

from hf_cod import (
    LayerAllocation,
    LayerScores,
    WidthPlan,
    allocate,
    drop,
    factorize,
    find_decoder_layers,
    narrow,
    perplexity,
    prune,
)
from hf_cod.analysis.statistics.input_products import MomentsRecorder
from hf_cod.compression.width.gradients import measure_taylor
from hf_cod.compression.width.methods import COMPENSATIONS, METHODS
from hf_cod.compression.width.width_plan import plan_of_allocation, within_reach
from hf_cod.functional.channels import DAMPING, fluctuation
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import SampleSettings, split_samples, token_batches
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.unit_discovery import find_all_units, find_units
from hf_cod.scoring.allocation import same_share
from tests import references
from tests.fresh_processes import run_fresh
from tests.tiny_models import CAUSAL, MIXTURES, OTHERS, PLAIN, batch_for, build, double, outputs, two_batches

# MPNet's attention, most of its weights, stays whole.
SPREAD = {"mpnet": 0.04}
# Of these, a config can say narrower layers that are all alike.
STOCK = ["llama", "llama_tied", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "gemma3", "mpnet", "vit"]


def different(layers=4, budget=0.65, spread=0.2):
    """A plan by which layers differ, of no model in particular."""
    scores = LayerScores("m", "mine", [3.0, 1.0, 2.0, 2.5][:layers], [1] * layers)
    return replace(allocate(scores, "parameter_share", budget, spread), sizes=None)


def by_hand(model, batches, report):
    """Layer by layer: the whole model runs, with the layers before changed already; what goes is columns of zeros, and
    those that stay are fitted by ridge regression on explicit matrices.
    """
    model = copy.deepcopy(model)
    stack = find_decoder_layers(model)
    for index in range(len(stack)):
        inputs = references.linear_inputs(model, batches, index)
        for units in find_units(stack, index).found:
            W, X = inputs[units.writer]
            kept_count = report.results[units.kind][index] // units.heads
            width = W.shape[1] // units.count
            energy = X.var(0, unbiased=False) * W.square().sum(0)
            values = [float(energy[u * width : (u + 1) * width].sum()) for u in range(units.count)]
            kept = sorted(sorted(range(units.count), key=lambda u, values=values: -values[u])[:kept_count])
            k = [u * width + i for u in kept for i in range(width)]
            r = [j for j in range(W.shape[1]) if j not in k]
            scale = DAMPING**0.5 * X[:, k].norm(dim=0)
            left = torch.cat([X[:, k], torch.diag(scale)])
            right = torch.cat([X[:, r] @ W[:, r].T, W.new_zeros(len(k), len(W))])
            new = torch.zeros_like(W)
            new[:, k] = W[:, k] + torch.linalg.lstsq(left, right).solution.T
            module = model.get_submodule(units.writer)
            module.weight.data.copy_(new.T if isinstance(module, Conv1D) else new)
            if units.vectors:  # a norm over all heads: the mean is that of the others and zeros
                for name, owners in units.readers.items():
                    model.get_submodule(name).weight.data[~torch.isin(owners, torch.tensor(kept))] = 0
    return model


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_against_the_formula(family):
    model = build(family, layers=3, dtype=torch.float64)
    batches = double(two_batches(model, "left"))
    intact = copy.deepcopy(model)
    report = narrow(model, different(3, spread=SPREAD.get(family, 0.2)), batches=batches, channel_multiple=4)
    expected = by_hand(intact, batches, report)
    assert len(set(report.results["channels"])) > 1
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in intact.parameters())
    # OLMo 2's norm over all heads computes in float32, and adds epsilon to the mean of fewer numbers.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if family == "olmo2" else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(outputs(model, batches[0]), outputs(expected, batches[0]), **tolerance)


def test_variances_beside_large_means():
    """In float32, E[x^2] - E[x]^2 would be all rounding errors here."""
    model = build("opt", layers=1)
    stack, (batch,) = find_decoder_layers(model), [batch_for(model)]
    (writer,) = [own.writer for own in find_units(stack, 0).found if own.kind == "channels"]
    with torch.no_grad():
        stack[0].fc1.bias.fill_(3000.0)
    recorder = MomentsRecorder(stack, [0], [writer])
    with recorder.attached(), torch.no_grad():
        recorder.start(batch)
        model(**batch)
        recorder.finish(0)
    W, X = references.linear_inputs(model, [batch], 0)[writer]
    expected = X.double().var(0, unbiased=False) * W.double().square().sum(0)
    torch.testing.assert_close(
        fluctuation(W, recorder.of(writer), torch.arange(X.shape[1]), X.shape[1]), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_taylor_against_gradients_one_by_one(family):
    """Every weight of a unit times its gradient, for each batch alone."""
    model = build(family, layers=2, dtype=torch.float64)
    stack, batches = find_decoder_layers(model), two_batches(model)
    units = find_all_units(stack)
    found = measure_taylor(stack, units, batches, False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for own in (own for layer in units for own in layer.found):
        expected = torch.zeros(own.count, dtype=torch.float64)
        for batch in batches:
            loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
            names = [*own.readers, own.writer]
            weights = [model.get_submodule(name).weight for name in names]
            grads = torch.autograd.grad(loss, weights)
            for unit in range(own.count):
                total = 0.0
                for name, w, g in zip(names, weights, grads, strict=True):
                    product = (w * g).detach()
                    product = product.T if isinstance(model.get_submodule(name), Conv1D) else product
                    product = product.T if name == own.writer else product  # a row is what a unit owns
                    total += float(product[own.readers.get(name, own.columns) == unit].sum())
                expected[unit] += abs(total) / len(batches)
        torch.testing.assert_close(found[own.writer], expected)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_units_that_do_nothing_go_without_a_trace(method, compensation):
    for family in ("llama", "gpt2"):
        model = build(family, dtype=torch.float64)
        stack = find_decoder_layers(model)
        with torch.no_grad():
            for index in range(4):
                for own in find_units(stack, index).found:
                    silence(stack, own, [0] if own.kind == "heads" else [1, 5, *range(20, 26)])
        expected, shape = outputs(model), find_units(stack, 0)
        heads, channels = shape["heads"], shape["channels"]
        kept = [(heads.count - 1) * heads.heads] * 4, [channels.count - 8] * 4
        report = narrow(model, WidthPlan(0.8, *kept, "mine"), method, compensation, batches=two_batches(model))
        assert (report.results["heads"], report.results["channels"]) == kept
        torch.testing.assert_close(outputs(model), expected, rtol=1e-10, atol=1e-10)


def silence(stack, own, which):
    for name, owners in (*own.readers.items(), (own.writer, own.columns)):
        module = stack.model.get_submodule(name)
        W = module.weight.T if isinstance(module, Conv1D) else module.weight
        rows = W.T if name == own.writer else W
        rows[torch.isin(owners, torch.tensor(which))] = 0


@pytest.mark.parametrize("family", [*CAUSAL, *OTHERS])
def test_applied_saved_and_loaded_again(family, tmp_path):
    for name, plan in (("alike", 0.65), ("different", different(spread=SPREAD.get(family, 0.2)))):
        model = build(family, dtype=torch.bfloat16)
        stock = type(model)
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_for(model).items()}
        before = sum(p.numel() for p in model.parameters())
        report = narrow(model, plan, batches=[batch], channel_multiple=4)
        found = report.results["parameters"]
        assert found == {"intact": before, "narrowed": sum(p.numel() for p in model.parameters())}
        tolerance = 0.1 if family in MIXTURES else 0.03  # experts of 16 channels, in multiples of 8
        assert report.results["parameter_share"] == pytest.approx(0.65, abs=tolerance)
        assert report.results["stock"] == (type(model) is stock)
        if family not in MIXTURES:  # these depend on the shapes of their experts: see test_experts.py
            assert report.results["stock"] == (name == "alike" and family in STOCK)
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
        again = type(model).from_pretrained(tmp_path / name)
        assert torch.equal(outputs(loaded, batch), outputs(again, batch))
        # A second time, saved again.
        loaded.save_pretrained(tmp_path / f"{name}-again")
        again = type(model).from_pretrained(tmp_path / f"{name}-again")
        assert torch.equal(outputs(loaded, batch), outputs(again, batch))


@pytest.mark.process
def test_fresh_processes_with_and_without_the_package(tmp_path):
    """Layers that differ: with it, or as remote code; layers that are alike: by transformers alone."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    batch = {"input_ids": torch.arange(3, 12)[None]}
    for name, plan, compensation, starts in (
        ("different", different(), "bias", [("import hf_cod", ""), (f"sys.path.insert(0, {str(hidden)!r})", "trust")]),
        ("alike", 0.6, "least_squares", [(f"sys.path.insert(0, {str(hidden)!r})", "")]),
    ):
        model = build("llama_tied")
        narrow(model, plan, "fluctuation", compensation, batches=two_batches(model), channel_multiple=8)
        model.save_pretrained(tmp_path / name)
        for start, trust in starts:
            code = (
                f"import sys, torch\n{start}\nfrom transformers import AutoModelForCausalLM\n"
                f"model = AutoModelForCausalLM.from_pretrained('.'{', trust_remote_code=True' if trust else ''})\n"
                "print(type(model).__module__)\n"
                "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), 'logits.pt')\n"
            )
            place = tmp_path / name
            done = run_fresh(code, cwd=place)
            assert done.returncode == 0, done.stderr[-2000:]
            where = "transformers." if name == "alike" else "transformers_modules." if trust else "hf_cod."
            assert done.stdout.startswith(where)
            assert torch.equal(torch.load(place / "logits.pt"), outputs(model, batch)), (name, trust)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_generation_with_and_without_cache(family, attention):
    model = build(family)
    model.set_attn_implementation(attention)
    narrow(model, different(), batches=two_batches(model, "left"), channel_multiple=4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch_for(model, "left"), **options)
    assert torch.equal(cached, model.generate(**batch_for(model, "left"), **options, use_cache=False))
    keys = [layer.keys.shape[1] for layer in model(**batch_for(model), use_cache=True).past_key_values.layers]
    assert len(set(keys)) > 1, "heads differ by layer in the cache"


def test_padding_does_not_count():
    """The same tokens, padded and not, leave the same model."""
    padded, plain = build("llama", dtype=torch.float64), build("llama", dtype=torch.float64)
    batch = batch_for(padded, "left")
    rows = [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    narrow(padded, different(), batches=[batch], channel_multiple=4)
    narrow(plain, different(), batches=[{"input_ids": ids} for ids in rows], channel_multiple=4)
    for a, b in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # positions are rotated in float32


def test_the_bias_is_recorded_saved_and_dropped_with_its_layer(tmp_path):
    model = build("llama")
    report = narrow(model, 0.6, "fluctuation", "bias", batches=two_batches(model), channel_multiple=8)
    assert not report.results["stock"]
    assert model.model.layers[1].mlp.down_proj.bias.any() and model.model.layers[1].self_attn.o_proj.bias.any()
    assert model.config.module_shapes["layers.1.mlp.down_proj"] == {"in_features": 32, "bias": 1}
    drop(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model)) and loaded.model.layers[1].mlp.down_proj.bias.any()


def test_adapters_and_device_map(tmp_path):
    model = build("llama")
    narrow(model, different(), batches=two_batches(model), channel_multiple=4)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert isinstance(loaded, LlamaForCausalLM) and torch.equal(outputs(loaded), outputs(model))
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(loaded, settings)
    batch = batch_for(model)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    expected = outputs(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
    )
    assert torch.equal(outputs(again, batch), expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged, batch), expected, atol=1e-5, rtol=1e-4)


def test_nothing_else_changes_and_the_model_is_left_as_it_was():
    model = build("gpt2").train()
    names = {n for i in range(4) for n in find_decoder_layers(model).linears(i)}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[0] not in names}
    narrow(model, different(), "taylor", batches=two_batches(model), channel_multiple=4)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], before) for name, before in others.items())
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_allocation_is_met_and_a_narrow_model_narrowed_again():
    model = build("llama", hidden_size=64, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4)
    plan = different(budget=0.6, spread=0.2)
    report = narrow(model, plan, batches=[batch_for(model)], channel_multiple=8)
    assert report.results["parameter_share"] == pytest.approx(plan.mean, abs=0.01)
    off = [kept - share for kept, share in zip(report.layers["parameter_share"], plan.values, strict=True)]
    assert off == pytest.approx([0] * 4, abs=0.03)
    left = sum(p.numel() for p in model.model.layers[2].parameters() if p.dim() == 2)
    assert left == report.layers["parameter_share"][2] * report.layers["parameters"][2]
    assert report.settings["plan"] == "parameter_share 0.6 by mine"
    heads = [layer.self_attn.q_proj.out_features // 8 for layer in model.model.layers]
    assert heads == report.results["heads"] and len(set(heads)) > 1
    again = narrow(model, 0.8, "magnitude", "none", channel_multiple=8)
    assert again.results["parameter_share"] == pytest.approx(0.8, abs=0.05)
    assert outputs(model).isfinite().all() and "error" not in again.layers


def test_one_layer_of_many_heads_without_groups():
    model = build("llama", layers=1, num_key_value_heads=4)
    report = narrow(model, 0.5, batches=[batch_for(model)], channel_multiple=8)
    assert report.results["stock"] and model.config.num_key_value_heads == model.config.num_attention_heads == 2
    assert model.config.head_dim == 8 and model.config.intermediate_size == report.results["channels"][0]


def test_numbers_of_heads_that_a_family_refuses_are_recorded_instead(tmp_path):
    """Llama wants them to divide the hidden size."""
    model = build("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8)
    report = narrow(model, WidthPlan(0.7, [5] * 4, [48] * 4, "mine"), batches=[batch_for(model)])
    assert not report.results["stock"] and model.config.num_attention_heads == 8
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, KeyboardInterrupt])
def test_a_family_that_refuses_sizes_in_a_way_of_its_own(error, monkeypatch, tmp_path):
    model, build_layers = build("llama"), LlamaModel.__init__

    def refusing(self, config):
        if config.intermediate_size != 48:
            raise error("not this one")
        build_layers(self, config)

    monkeypatch.setattr(LlamaModel, "__init__", refusing)
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else nullcontext():
        assert not narrow(model, 0.6, "magnitude", "none", channel_multiple=8).results["stock"]
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))
    assert model.config.intermediate_size == 48 and model.config.num_attention_heads == 4


@pytest.mark.parametrize("method, compensation", [("fluctuation", "least_squares"), ("taylor", "none")])
@pytest.mark.parametrize("stop", range(5))
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(method, compensation, stop, tmp_path, monkeypatch):
    batches = two_batches(build("llama"), "left")
    work = {"method": method, "compensation": compensation, "batches": batches, "channel_multiple": 4}
    whole = build("llama")
    expected = narrow(whole, different(), **work)
    add, done = FinishedLayers.add, []

    def dies(self, index, note):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(index)
        add(self, index, note)

    monkeypatch.setattr(FinishedLayers, "add", dies)
    try:
        narrow(build("llama"), different(), **work, journal=tmp_path)
    except KeyboardInterrupt:
        assert stop < 4
    assert len(list(tmp_path.iterdir())) == stop
    added = []
    monkeypatch.setattr(FinishedLayers, "add", lambda self, i, note: (added.append(i), add(self, i, note)))
    resumed = build("llama")
    report = narrow(resumed, different(), **work, journal=tmp_path)
    assert added == list(range(stop, 4)), "finished layers are not narrowed again"
    assert report.layers == expected.layers and report.results == expected.results
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_after_an_error_the_model_can_be_saved_as_it_is(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"first at the input of model.layers.2.self_attn.o_proj, batch 0"):
        narrow(model, 0.5, batches=two_batches(model), channel_multiple=8)
    assert [layer.mlp.up_proj.out_features < 48 for layer in model.model.layers] == [True, True, False, False]
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].mlp.up_proj.out_features < 48


def test_what_has_another_structure_stays_whole_and_is_named():
    sizes = {"moe_intermediate_size": 12}
    mixture = narrow(build("qwen2_moe", **sizes), 0.9, "magnitude", "none", channel_multiple=8)
    reason = "experts are not narrowed: numbers of channels are multiples of 8, and an expert has 12"
    assert mixture.notes == [f"layers 0, 2, 3: {reason}"]
    with pytest.raises(ValueError, match=rf"in layer 0 \(one group .*; {reason}"):
        narrow(build("qwen2_moe", **sizes), 0.1, "magnitude", "none", channel_multiple=8)


def test_a_plan_goes_through_a_file(tmp_path):
    plan = WidthPlan(0.7, [2, 4, None, 2], [40, 48, 16, None], "mine")
    assert WidthPlan.load(plan.save(tmp_path / "plan.json")) == plan
    report = narrow(build("llama"), plan, "magnitude", "none")
    assert report.layers["share_of_heads"] == [0.5, 1, 1, 0.5]
    assert report.layers["share_of_channels"][:3] == [40 / 48, 1, 16 / 48]
    assert (report.results["heads"], report.results["channels"]) == (plan.heads, plan.channels)


@pytest.mark.parametrize("compensation", ["least_squares", "none"])
def test_zeros_that_are_filled_are_told_of(compensation):
    """Of the last matrices of attention and MLP, 2 in each of 4 layers."""
    model = build("llama")
    prune(model, 0.5, "magnitude")
    notes = narrow(model, 0.7, compensation=compensation, batches=two_batches(model), channel_multiple=8).notes
    told = [note for note in notes if "lost their zeros" in note]
    filled = [] if compensation == "none" else ["8 of 28"]
    assert [note.partition(" pruned matrices")[0] for note in told] == filled


def test_bad_plans():
    model = build("llama")
    before = [p.detach().clone() for p in model.parameters()]
    full = [48] * 4
    for plan, message in [
        (
            WidthPlan(0.5, [3, 4, 4, 4], full, "x"),
            "heads: expected a multiple of 2, which share a key .* layer 0, got 3",
        ),
        (WidthPlan(0.5, [4, 6, 4, 4], full, "x"), r"heads: expected a multiple of 2, .* in 2..4 in layer 1, got 6"),
        (WidthPlan(0.5, [4] * 4, [48, 0, 48, 48], "x"), r"channels: expected 1..48 in layer 1, got 0"),
        (WidthPlan(0.5, [4] * 3, full, "x"), "heads: expected 4 numbers, one a layer, got 3"),
        (WidthPlan(0.5, [4] * 4, full, "x"), "plan: expected fewer heads or channels than the model has, got all"),
        (LayerAllocation("rank", 0.5, [0.5] * 4, [1] * 4, "x"), "plan: expected an allocation of parameter_share"),
        (
            LayerAllocation("parameter_share", 0.5, [0.5] * 3, [1] * 3, "x"),
            "plan: expected 4 values, one a layer, got 3",
        ),
        (LayerAllocation("parameter_share", 0.5, [0.5, 1.2, 0, 0], [1] * 4, "x"), "got 1.2 in layer 1"),
        (1.5, r"plan: expected a share of parameters in 0..1, got 1.5"),
        (0.05, r"parameter_share: expected at least 0.3\d* in layer 0 \(one group of heads and 8 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            narrow(model, plan, "magnitude", "none", channel_multiple=8)
    for options, message in [
        ({"method": "best"}, "method: expected one of fluctuation, taylor, magnitude, got 'best'"),
        ({"compensation": "luck"}, "compensation: expected one of least_squares, bias, none, got 'luck'"),
        ({}, "batches: expected batches, or tokenizer and texts, for fluctuation with least_squares, got neither"),
        ({"batches": ["some text"]}, "batches: expected dicts of tensors for the model's forward, got str"),
        (
            {"method": "taylor", "compensation": "none"},
            "batches: expected batches, or tokenizer and texts, for taylor with none, got neither",
        ),
        (
            {"method": "magnitude", "compensation": "none", "channel_multiple": 0},
            "channel_multiple: expected a whole number above 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            narrow(model, 0.6, **options)
    with pytest.raises(
        ValueError, match="taylor: expected a loss and floating-point weights in memory, got none: BertModel"
    ):
        headless = build("bert_headless")
        narrow(headless, 0.6, "taylor", "none", batches=[batch_for(headless)], channel_multiple=8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_plans_of_another_model_are_refused(tmp_path, caplog):
    """Of another size; of another name alone, it is said."""
    model, other = build("llama"), build("llama", intermediate_size=64)
    stack = find_decoder_layers(other)
    scores = LayerScores("some/other", "mine", [1.0, 2.0, 3.0, 4.0], [stack.count_weights(0)] * 4)
    plan = allocate(scores, "parameter_share", 0.6)
    widths = plan_of_allocation(stack, find_all_units(stack), plan, 8)
    assert WidthPlan.load(widths.save(tmp_path / "plan.json")) == widths
    mine = find_decoder_layers(model).count_weights(0)
    for wrong in (plan, widths):
        with pytest.raises(ValueError, match=rf"plan: expected those of a model with {mine} weights in layer 0, got"):
            narrow(model, wrong, "magnitude", "none", channel_multiple=8)
    assert find_decoder_layers(model).count_weights(0) == mine
    caplog.clear()
    narrow(copy.deepcopy(other), widths, "magnitude", "none", channel_multiple=8)
    assert not caplog.messages
    narrow(other, plan, "magnitude", "none", channel_multiple=8)
    assert "plan: used on LlamaForCausalLM, but computed for some/other, which has layers" in caplog.text


def test_weights_that_cannot_be_exchanged_are_refused_before_anything_changes():
    shared, broken, factors = (build("llama") for _ in range(3))
    shared.model.layers[3].mlp.up_proj = shared.model.layers[1].mlp.up_proj
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[3, 4] = torch.inf
    factorize(factors, 0.5, "plain")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    for model, message in [
        (shared, r"a separate weight for each matrix, got model.layers.1.mlp.up_proj.weight"),
        (broken, "weights: expected finite numbers, got NaN or infinity in model.layers.3.mlp.up_proj"),
        (factors, r"model: expected dense matrices, got factors in model.layers.0.self_attn.q_proj"),
        (adapted, r"got an adapter at model.layers.0.mlp.up_proj; call merge_and_unload first"),
    ]:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            narrow(model, 0.5, batches=[batch_for(build("llama"))])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_least_squares_saves_a_real_model(smollm2, brown_text):
    """Four samples of 256 tokens are few; without them, what a fifth of the weights did is lost altogether."""
    found = {}
    for compensation in ("least_squares", "none"):
        model, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
        settings = SampleSettings(sequence_length=256, max_samples=8, batch_size=4)
        narrowing, measuring = split_samples(token_batches(tokenizer, brown_text, settings), 4)
        intact = perplexity(model, measuring)
        report = narrow(model, 0.8, "fluctuation", compensation, batches=narrowing)
        assert report.results["stock"] and report.results["heads"] == [6] * 30
        assert 0.79 < report.results["parameter_share"] < 0.81
        found[compensation] = perplexity(model, measuring)
    assert intact < found["least_squares"] < found["none"]


def test_shares_that_a_layer_cannot_keep_are_raised_and_the_others_give_that(caplog):
    model = build("llama")
    stack = find_decoder_layers(model)
    units = find_all_units(stack)
    uneven = replace(same_share(stack, 0.7), values=[0.02, *[0.7 + 0.68 / (len(stack) - 1)] * (len(stack) - 1)])
    with pytest.raises(ValueError, match="parameter_share: expected at least"):
        plan_of_allocation(stack, units, uneven, 1)
    met = within_reach(stack, units, uneven, 1)
    assert met.mean == pytest.approx(0.7) and met.values[0] > 0.02 and max(met.values[1:]) < uneven.values[1]
    assert "layers 0 keep the least share that they can" in caplog.text
    plan_of_allocation(stack, units, met, 1)
    even = same_share(stack, 0.7)
    assert within_reach(stack, units, even, 1) is even
