"""The score kl, compared with a naive loop over copies of the model."""

import copy
import math

import pytest
import torch

from hf_cod import collect_statistics, find_decoder_layers, score_layers
from hf_cod.functional import codebook
from hf_cod.layers.parts import parts_of
from hf_cod.scoring.divergence_probe import DivergenceProbe, divergence_cost
from tests import references
from tests.tiny_models import build


def batches():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}]


@torch.no_grad()
def divergence(intact, changed):
    """KL(intact || changed) per real token, in float64."""
    total = tokens = 0
    for batch in batches():
        p, q = (model(**batch).logits.double().log_softmax(-1) for model in (intact, changed))
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        total += float((p.exp() * (p - q)).sum(-1)[keep].sum())
        tokens += int(keep.sum())
    return total / tokens


@torch.no_grad()
def naive(model, names, pruner, squares):
    changed = copy.deepcopy(model)
    for name in names:
        W = changed.get_submodule(name).weight
        if pruner == "codebook":
            W.copy_(codebook.rounded(W, 3, squares[name]))
        else:
            W.mul_(~references.magnitude_mask(W, 0.7))
    return divergence(model, changed)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pruner", ["magnitude", "codebook"])
@pytest.mark.parametrize("granularity", ["layer", "block", "module"])
def test_kl_is_that_of_a_naive_loop(granularity, pruner, layers):
    model = build("llama", layers=layers).double().eval()
    before = copy.deepcopy(model.state_dict())
    target = 3.5 if pruner == "codebook" else 0.7
    squares = collect_statistics(model, batches()).squares
    scores = score_layers(model, method="kl", batches=batches(), granularity=granularity, pruner=pruner, target=target)
    parts = parts_of(find_decoder_layers(model), granularity, fuses=pruner == "codebook")
    found = scores.values if granularity == "layer" else [part.value for part in scores.parts]
    for value, part in zip(found, parts, strict=True):
        weights = sum(model.get_submodule(name).weight.numel() for name in part.names)
        expected = naive(model, part.names, pruner, squares) / (1 if granularity == "layer" else weights)
        assert value == pytest.approx(math.log(expected), abs=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_a_killed_kl_resumes_bit_by_bit(granularity, tmp_path, monkeypatch):
    model = build("llama", layers=3).eval()
    more = {"method": "kl", "batches": batches(), "granularity": granularity}
    whole = score_layers(model, **more)
    compared, counts = DivergenceProbe._compared, []

    def killed(probe, *given):
        counts.append(1)
        if len(counts) == 5:
            raise KeyboardInterrupt
        return compared(probe, *given)

    monkeypatch.setattr(DivergenceProbe, "_compared", killed)
    with pytest.raises(KeyboardInterrupt):
        score_layers(model, **more, journal=tmp_path)
    assert score_layers(model, **more, journal=tmp_path) == whole
    parts = len(whole.parts) or 3
    assert len(counts) == 1 + 2 * parts, "two batches for each part, and the one that was interrupted"
    assert score_layers(model, **more, journal=tmp_path, target=0.5) != whole


def test_kl_prints_its_cost_first(capsys):
    """A forward pass of a layer counts 1 / 3; each part also runs the last layer of the intact model."""
    ran, model = [], build("llama", layers=3)
    for layer in find_decoder_layers(model):
        layer.register_forward_hook(lambda *a: ran.append(capsys.readouterr().out))
    score_layers(model, method="kl", batches=batches(), granularity="block", pruner="magnitude", show_progress=True)
    passes = divergence_cost(3, [0, 0, 1, 1, 2, 2])
    said = f"kl: 6 parts on 3 samples take as long as {passes:.0f} forward passes of these samples"
    start = next(i for i, printed in enumerate(ran) if said in printed)
    assert len(ran) - start == pytest.approx(passes * 3 * 2), "two batches"


def test_kl_requires_a_language_model():
    with pytest.raises(ValueError, match="model: expected a language model"):
        score_layers(build("bert"), method="kl", batches=batches(), pruner="magnitude")


def test_weights_that_stay_have_no_divergence():
    stack = find_decoder_layers(build("llama"))
    probe = DivergenceProbe(stack, "magnitude", None, batches(), show_progress=False)
    assert probe.divergences(parts_of(stack, "block"), 0.0) == pytest.approx([0.0] * 2 * len(stack), abs=1e-6)
