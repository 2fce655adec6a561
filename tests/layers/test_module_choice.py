"""Which matrices a choice leaves, counts and names, through `prune`; each function has tests of its own."""

import pytest
import torch

from examples.tiny_architectures import build as build_type
from hf_cod import factorize, find_decoder_layers, narrow, prune, quantize
from hf_cod.layers.module_choice import by_place, choose_modules, in_layers
from tests.tiny_models import MIXTURES, build, two_batches


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_chosen_matrices_are_pruned_and_counted(family, method):
    model, ends = build(family), {"llama": ("gate_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}[family]
    before = weights(model)
    report = prune(model, 0.5, method, batches=two_batches(model), include=[*ends], exclude=r".*\.0\..*")
    stack = find_decoder_layers(model)
    chosen = [n for i in (1, 2, 3) for n, _ in stack.matrices(i) if n.endswith(ends)]
    assert changed(model, before) == {f"{name}.weight" for name in chosen}
    zeros = {name: float((W == 0).float().mean()) for i in range(4) for name, W in stack.matrices(i) if name in chosen}
    assert report.results["module_sparsity"] == pytest.approx(zeros) and report.results["sparsity"] == 0.5
    assert report.layers["target"] == [None, 0.5, 0.5, 0.5] and report.layers["sparsity"][0] is None
    excluded = [(n, W.numel()) for i in range(4) for n, W in stack.matrices(i) if n not in chosen]
    (note,) = (note for note in report.notes if "are not pruned" in note)
    assert note.startswith(f"{len(excluded)} matrices of {sum(size for _, size in excluded):,} weights")
    assert sum(report.layers["parameters"]) + sum(n for _, n in excluded) == sum(map(stack.count_weights, range(4)))
    assert report.settings["include"] == [*ends] and report.settings["exclude"] == r".*\.0\..*"
    again = build(family)
    same = {name: report.settings[name] for name in ("include", "exclude")}
    prune(again, 0.5, report.settings["method"], batches=two_batches(again), **same)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_bank_of_experts_is_named_as_a_whole_or_by_parameter():
    for family in MIXTURES:
        model = build(family)
        banks = [name for i in range(4) for name in find_decoder_layers(model).experts(i)]
        if not banks:
            continue
        end = banks[0].rpartition(".")[2]
        before = weights(model)
        prune(model, 0.5, "wanda", batches=two_batches(model), include=[end], exclude=[f"{end}.down_proj"])
        moved = changed(model, before)
        assert moved and all(name.rpartition(".")[0] in banks and not name.endswith("down_proj") for name in moved)
        return
    pytest.fail("no family with a bank of experts")


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(ValueError, match="exclude: expected names that leave some of the included matrices"):
        prune(build("llama"), 0.5, "magnitude", include=["up_proj"], exclude=["up_proj", "down_proj"])


def test_a_journal_of_another_choice_is_not_taken(tmp_path):
    model = build("llama")
    batches = two_batches(model)
    prune(model, 0.5, batches=batches, exclude=["up_proj"], journal=tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again, other, by_expression = build("llama"), build("llama"), build("llama")
    prune(again, 0.5, batches=batches, exclude=["up_proj"], journal=tmp_path)
    prune(by_expression, 0.5, batches=batches, exclude=r".*\.up_proj", journal=tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == files
    before = weights(other)
    prune(other, 0.5, batches=batches, exclude=["down_proj"], journal=tmp_path)
    assert len([*tmp_path.glob("*.safetensors")]) == 2 * len(files)
    assert not [name for name in changed(other, before) if "down_proj" in name]
    assert changed(again, before) == changed(model, before) == changed(by_expression, before)


def test_names_in_short():
    assert by_place(["a.0.q", "a.0.k", "a.1.q", "a.3.q", "head"]) == [
        "a.*.q (layers 0, 1, 3)",
        "a.*.k (layer 0)",
        "head",
    ]
    assert in_layers([2, 3, 4]) == "layers 2 to 4"


def test_all_matrices_are_chosen_by_default():
    choice = choose_modules(
        find_decoder_layers(build("llama")), type("Settings", (), {"include": None, "exclude": None})
    )
    assert not choice.notes("pruned") and not choice.identity and not choice.stack.excluded


@pytest.mark.parametrize(
    "treat",
    [
        lambda model, batches: prune(model, 0.5, "magnitude", stack="encoder"),
        lambda model, batches: quantize(model, bits=3, stack="encoder"),
        lambda model, batches: factorize(model, 0.9, "plain", stack="encoder"),
        lambda model, batches: narrow(model, 0.7, "magnitude", "none", stack="encoder"),
    ],
)
def test_reports_name_the_stacks_that_are_left_as_they_are(treat):
    model = build_type("seq2seq/bart")
    report = treat(model, None)
    (told,) = [note for note in report.notes if "stack='decoder' names them" in note]
    assert told.startswith("the 4 layers of 'decoder' (model.decoder.layers) are not ")
