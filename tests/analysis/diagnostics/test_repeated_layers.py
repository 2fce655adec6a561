"""Layers that run several times in a forward pass, and layers with two streams, against hooks on each call."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import diagnose, find_decoder_layers, plan_depth, score_layers
from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from tests.layers.test_layer_calls import looped
from tests.tiny_models import batch_for

METRICS = ["angular_distance", "block_influence", "output_variance"]


class Repeated(torch.nn.ModuleList):
    """Layers each of which a model runs twice in succession."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return [layer for layer in found for _ in range(2)] if isinstance(index, slice) else found


def repeated():
    model = looped()
    model.model.layers = Repeated(list(model.model.layers))
    return model


# Kind -> model, and name of its stack: the whole list twice, each layer twice, a loop of two inner layers, two lists.
LOOPS = {
    "looped": (looped, None),
    "repeated": (repeated, None),
    "dory": (lambda: build_type("dory"), None),
    "hrm low": (lambda: build_type("hrm_text"), "model.L_module.layers"),
    "hrm high": (lambda: build_type("hrm_text"), "model.H_module.layers"),
}


def inputs_of(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def calls_of(model, stack, batch):
    """(layer, input, output) of each call, in order."""
    found = []

    def hook(index):
        return lambda _, args, kwargs, output: found.append(
            (index, (args[0] if args else kwargs["hidden_states"]).double(), output.double())
        )

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def runs_of(calls):
    """The runs through the list: a new one begins with a layer that is in the run already."""
    runs = [{}]
    for index, x, y in calls:
        if index in runs[-1]:
            runs.append({})
        runs[-1][index] = (x, y)
    return runs


def angle(a, b):
    return cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() / math.pi


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("make, path", LOOPS.values(), ids=LOOPS)
def test_figures_are_means_over_the_runs_of_a_layer(make, path, token):
    model = make()
    stack, batch = find_decoder_layers(model, path), inputs_of(model)
    calls, real = calls_of(model, stack, batch), batch["attention_mask"].bool()
    at = (lambda x: x[[0, 1], [8, 5]]) if token == "last" else (lambda x: x)

    def by_sample(tokens):
        return torch.stack([tokens[i][real[i]].mean() for i in (0, 1)])

    def mean_of(tokens):
        return float(tokens.mean() if token == "last" else by_sample(tokens).mean())

    report = diagnose(model, batches=[batch], layers_path=path, metrics=METRICS, token=token, show_progress=False)
    L = len(stack)
    for layer in range(L):
        own = [(x, y) for index, x, y in calls if index == layer]
        assert report.results["runs"][layer] == len(own)
        variances = [y[real].var(correction=0) for _, y in own]
        shares = [(y - x)[real].var(correction=0) / y[real].var(correction=0) for x, y in own]
        influences = [1 - by_sample(cosine_similarity(x, y, dim=-1)) for x, y in own]
        expected = {
            "variance": torch.stack(variances).mean(),
            "mean": torch.stack([y[real].mean() for _, y in own]).mean(),
            "max_abs": torch.stack([y[real].abs().max() for _, y in own]).max(),
            "added_share": torch.stack(shares).mean(),
            "block_influence": torch.stack(influences).mean(),
        }
        for name, value in expected.items():
            assert report.layers[name][layer] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (name, layer)
        for n in range(1, L + 1):
            whole = [run for run in runs_of(calls) if all(index in run for index in range(layer, layer + n))]
            # The state of a run is what the layer before has returned, and its own input at the start of the run.
            first = [run[layer - 1][1] if layer - 1 in run else run[layer][0] for run in whole]
            turned = [mean_of(angle(at(x), at(run[layer + n - 1][1]))) for x, run in zip(first, whole, strict=True)]
            found = report.results["angular_distance"][layer][n - 1]
            wanted = pytest.approx(sum(turned) / len(turned), abs=1e-6) if turned and layer + n <= L else None
            assert found == wanted, (layer, n)


def test_the_report_says_how_often_a_layer_ran():
    report = diagnose(build_type("dory"), batches=[{"input_ids": torch.arange(3, 11)[None]}], metrics=METRICS)
    assert report.results["runs"] == [1, 2, 2, 1]
    assert report.notes == ["layers 1 to 2 ran 2 times in a forward pass; figures are means over these runs"]
    assert report.results["angular_distance"][0][3] is None  # no run has all layers


def test_batches_with_other_numbers_of_runs():
    """A model may decide by its input how often a layer runs."""
    model, one = looped(), batch_for(looped())
    twice = measure_forward(model, [one])
    once = copy.deepcopy(model)
    once.model.layers = torch.nn.ModuleList(list(once.model.layers))
    single = measure_forward(once, [one])
    handle = iter([False, True])
    layers = model.model.layers
    model.model.register_forward_pre_hook(
        lambda *_: setattr(model.model, "layers", layers if next(handle) else torch.nn.ModuleList(list(layers)))
    )
    stack = find_decoder_layers(model)
    model.model.layers = layers
    both = measure_forward(stack.model, [one, one])
    assert both.runs == (2,) * 4 and single.runs == (1,) * 4
    torch.testing.assert_close(both.distances, torch.cat([single.distances, twice.distances]))
    torch.testing.assert_close(both.influence, torch.cat([single.influence, twice.influence]))


@pytest.mark.parametrize("make, path", LOOPS.values(), ids=LOOPS)
def test_gradients_and_removal_count_each_run(make, path):
    model = make()
    stack, batch = find_decoder_layers(model, path), {"input_ids": inputs_of(model)["input_ids"]}
    report = diagnose(model, batches=[batch], layers_path=path, metrics=["gradient_norm", "layer_drop"])
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    for layer, found in enumerate(report.layers["gradient_norm"]):
        norms = torch.stack([p.grad.norm() for p in stack[layer].parameters()])
        assert found == pytest.approx(float(norms.norm()), rel=1e-4)
    assert report.results["layer_drop"]["intact"] == pytest.approx(float(loss.exp()), rel=1e-5)
    for layer, found in enumerate(report.results["layer_drop"]["without"]):
        own = stack[layer].forward
        stack[layer].forward = lambda hidden_states, *_, **__: hidden_states
        with torch.no_grad():
            expected = float(model(**batch, labels=batch["input_ids"], use_cache=False).loss.exp())
        stack[layer].forward = own
        assert found == pytest.approx(expected, rel=1e-5), layer


def test_an_interrupted_diagnosis_of_a_loop_resumes(tmp_path, monkeypatch):
    model, batches = looped(), [batch_for(looped())]
    first = diagnose(model, batches=batches, journal=tmp_path, show_progress=False)
    for door in ("measure_forward", "measure_gradient_norm"):
        monkeypatch.setattr(f"hf_cod.analysis.diagnostics.diagnosis.{door}", None)
    assert diagnose(model, batches=batches, journal=tmp_path, show_progress=False).layers == first.layers


def test_scores_of_layers_that_run_several_times():
    model, batch = looped(), batch_for(looped())
    scores = score_layers(model, batches=[batch], method="angular")
    report = diagnose(model, batches=[batch], metrics=["angular_distance"])
    assert scores.values == report.layers["angular_distance"]
    with pytest.raises(ValueError, match="expected layers that run once in a forward pass"):
        plan_depth(model, 1, batches=[batch])


def test_states_that_are_not_finite_in_a_loop_are_named():
    model, batch = looped(), batch_for(looped())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] = torch.nan
    for metric in ("output_variance", "gradient_norm"):
        with pytest.raises(ValueError, match="NaN or infinity first in the output of layer 2, batch 0"):
            diagnose(model, batches=[batch], metrics=[metric])


def reformer(**fields):
    torch.manual_seed(0)
    config = tiny_config("reformer")
    for name, value in fields.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def streams_of(model, batch):
    """The state before the first layer, and after each: both streams of each token (S, T, 2 d)."""
    states = OrderedDict()

    def hook(index):
        def keep(_, args, kwargs, output):
            states.setdefault(0, torch.cat([kwargs["prev_attn_output"], kwargs["hidden_states"]], -1))
            states[index + 1] = torch.cat([output.attn_output, output.hidden_states], -1)

        return keep

    layers = model.reformer.encoder.layers
    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [state.double() for state in states.values()]


# Tokens; the chunks are of 4.
@pytest.mark.parametrize("tokens", [8, 10])
@pytest.mark.parametrize("padded", [False, True])
def test_both_streams_of_a_token_are_one_vector(tokens, padded):
    """Also where the model pads its inputs to whole chunks: that padding does not count."""
    model = reformer(local_attn_chunk_length=4, lsh_attn_chunk_length=4)
    ids = torch.randint(3, 90, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens - 3 :] = 1 - int(padded)
    batch = {"input_ids": ids, **({"attention_mask": mask} if padded else {})}
    report = diagnose(model, batches=[batch], show_progress=False)
    states = streams_of(model, batch)
    assert states[0].shape[1] == -(-tokens // 4) * 4
    real = mask.bool()
    states = [state[:, :tokens] for state in states]
    last = [tokens - 1, tokens - 4 if padded else tokens - 1]
    for layer in range(4):
        x, y = states[layer], states[layer + 1]
        expected = angle(x[[0, 1], last], y[[0, 1], last]).mean()
        assert report.layers["angular_distance"][layer] == pytest.approx(float(expected), abs=1e-6)
        assert report.layers["variance"][layer] == pytest.approx(float(y[real].var(correction=0)), rel=1e-4)
        share = (y - x)[real].var(correction=0) / y[real].var(correction=0)
        assert report.layers["added_share"][layer] == pytest.approx(float(share), rel=1e-4)
    assert any(note.startswith("layer_drop was left out: reformer.encoder.layers.0 returns") for note in report.notes)
