"""Journals that were damaged: each record is checked, and what is wrong is done again."""

import json
import logging
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_cod import (
    collect_statistics,
    factorize,
    find_decoder_layers,
    narrow,
    plan_depth,
    plan_ranks,
    prune,
    quantize,
)
from hf_cod.io.journal import Journal
from hf_cod.io.tensors import is_whole, save_tensors
from tests.forged import forge_layer
from tests.tiny_models import build, outputs, two_batches


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def places(content, count):
    """Places of bytes all over a file, its beginning and its end among them."""
    return [*range(0, len(content) - 1, max(1, len(content) // count)), len(content) - 1]


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.fixture
def pruned(tmp_path):
    """A finished journal of pruning, and what it led to."""
    model = build("llama")
    prune(model, 0.5, batches=two_batches(model), journal=tmp_path / "journal")
    return tmp_path / "journal", weights_of(model)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_flipped_byte_of_a_finished_layer(layer, pruned, caplog):
    journal, expected = pruned
    file = sorted(journal.iterdir())[layer]
    content = file.read_bytes()
    for place in places(content, 20):
        file.write_bytes(flipped(content, place))
        caplog.clear()
        model = build("llama")
        with caplog.at_level(logging.WARNING):
            prune(model, 0.5, batches=two_batches(model), journal=journal)
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items()), place
        told = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
        # The header ends with spaces, which hold nothing.
        assert told == [f"{file} is damaged: layer {layer} is computed again"] or content[place] == ord(" ")


def test_a_finished_layer_of_an_earlier_version_is_taken(pruned):
    """Without a checksum; only its length tells."""
    journal, _ = pruned
    file = sorted(journal.iterdir())[1]
    tensors = {name: torch.full_like(tensor, 7.0) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"note": "[]"})
    model = build("llama")
    prune(model, 0.5, batches=two_batches(model), journal=journal)
    assert (find_decoder_layers(model)[1].mlp.up_proj.weight == 7).all()
    file.write_bytes(file.read_bytes()[:-4])
    model = build("llama")
    prune(model, 0.5, batches=two_batches(model), journal=journal)
    assert not (find_decoder_layers(model)[1].mlp.up_proj.weight == 7).any()


@pytest.mark.parametrize("change", [prune, quantize])
@pytest.mark.parametrize("source", ["another layer", "another work"])
def test_a_file_of_another_layer_or_work_counts_as_damaged(change, source, tmp_path, caplog):
    budgets = {prune: ({"plan": 0.5}, {"plan": 0.3}), quantize: ({"bits": 4}, {"bits": 3})}[change]
    results = []
    for name, budget in zip(("journal", "other"), budgets, strict=True):
        model = build("llama", intermediate_size=64, hidden_size=64)
        change(model, **budget, batches=two_batches(model), journal=tmp_path / name)
        results.append(outputs(model))
    mine = sorted((tmp_path / "journal").iterdir())
    foreign = sorted((tmp_path / "other").iterdir())
    content = (mine[2] if source == "another layer" else foreign[1]).read_bytes()
    mine[1].write_bytes(content)
    model = build("llama", intermediate_size=64, hidden_size=64)
    with caplog.at_level(logging.WARNING):
        change(model, **budgets[0], batches=two_batches(model), journal=tmp_path / "journal")
    assert torch.equal(outputs(model), results[0])
    assert [r.getMessage() for r in caplog.records] == [f"{mine[1]} is damaged: layer 1 is computed again"]


def test_any_flipped_byte_of_a_small_file_is_seen(tmp_path):
    file = tmp_path / "file.safetensors"
    save_tensors(file, {"a": torch.arange(5.0), "b": torch.ones(2, 3)}, {"note": '{"x": "é"}'}, checked=True)
    content = file.read_bytes()
    assert is_whole(file, {"note"}) and load_file(file).keys() == {"a", "b"}
    for place in range(len(content)):
        file.write_bytes(flipped(content, place))
        assert not is_whole(file, {"note"}) or content[place] == ord(" "), place
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        assert not is_whole(file, {"note"}), length


def test_flipped_bytes_of_a_journal_of_lines(tmp_path, caplog):
    model = build("llama")
    options = {"batches": two_batches(model), "journal": tmp_path}
    plan = plan_depth(model, 1, "layer_drop", **options)
    file = tmp_path / "journal.jsonl"
    content = file.read_bytes()
    for place in places(content[:-1], 40):
        file.write_bytes(flipped(content, place))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert plan_depth(model, 1, "layer_drop", **options) == plan
        told = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
        assert told and set(told) == {f"{file} has a damaged line: its result is computed again"}
        assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())


def test_lines_of_an_earlier_version_are_taken_and_others_are_not(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, "work").add("new", 1.5)
    whole = path.read_text()
    old, damaged = json.dumps(["work", "old", {"a": [1]}]), whole.replace("1.5", "1.6")
    path.write_text(f'{old}\n{damaged}5\n["work", 3, 4]\n["work", "key"]\n{whole.rstrip()}')
    assert Journal(path, "work").entries == {"old": {"a": [1]}, "new": 1.5}
    assert path.read_text() == f"{old}\n{whole}"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"journal: expected \[work, key, result\] in each line"):
        Journal(path, "work")  # a file of another kind
    assert path.read_text() == "{}\n"


def test_statistics_are_the_same_bytes_each_time(tmp_path):
    model = build("llama")
    files = [collect_statistics(model, two_batches(model)).save(tmp_path / str(n)).read_bytes() for n in range(8)]
    assert len(set(files)) == 1


OF_NOTES = {
    "null": lambda note: None,
    "another kind": lambda note: {} if isinstance(note, list) else [],
    "a name": lambda note: ["[/red]"] if isinstance(note, list) else {**note, "unseen": ["[/red]"]},
    "no number": lambda note: with_errors(note, "x"),
    "negative": lambda note: with_errors(note, -5.0),
    "NaN": lambda note: with_errors(note, math.nan),
    "more": lambda note: [*note, "more"] if isinstance(note, list) else {**note, "more": 1},
    "no errors": lambda note: None if isinstance(note, list) else {**note, "errors": type(note["errors"])()},
}


def with_errors(note, error):
    if isinstance(note, list):
        return [error]
    errors = note["errors"]
    return {**note, "errors": dict.fromkeys(errors, error) if isinstance(errors, dict) else [error] * len(errors)}


def grown(tensor):
    return torch.cat([tensor, tensor])


def slowly(*methods):
    return [pytest.param(method, marks=pytest.mark.slow) for method in methods]


OF_TENSORS = {
    "short": lambda t: t[..., :-1].clone(),
    "grown": grown,
    "another dimension": lambda t: t[None].clone(),
    "whole numbers": lambda t: t.to(torch.int16),
    "NaN": lambda t: t * torch.nan,
}
LAYER_METHODS = {
    "prune": lambda m, **more: prune(m, 0.5, **more),
    "quantize": lambda m, **more: quantize(m, bits=4, **more),
    "factorize": lambda m, **more: factorize(m, 0.7, **more),
    "oats": lambda m, **more: factorize(m, 0.7, "oats", **more),
    "narrow": lambda m, **more: narrow(m, 0.7, **more),
    "spectra": lambda m, **more: plan_ranks(m, 0.7, "spectrum", **more),
}


def refused(method, folder, **changes):
    """The error of a method that resumes from a journal whose second layer was edited."""
    model = build("llama")
    LAYER_METHODS[method](model, batches=two_batches(model), journal=folder)
    file = sorted(folder.iterdir())[1]
    forge_layer(file, **changes)
    model = build("llama")
    with pytest.raises(ValueError, match=r"expected .*, got .*safetensors'") as error:
        LAYER_METHODS[method](model, batches=two_batches(model), journal=folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change", OF_TENSORS)
@pytest.mark.parametrize("method", ["prune", "factorize", "narrow", "spectra", *slowly("quantize", "oats")])
def test_tensors_of_another_form_with_a_right_checksum_are_refused(method, change, tmp_path):
    def edited(tensors):
        name = next(key for key, tensor in sorted(tensors.items()) if tensor.is_floating_point())
        return {**tensors, name: OF_TENSORS[change](tensors[name])}

    refused(method, tmp_path, tensors=edited)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_missing_and_other_tensors_with_a_right_checksum_are_refused(method, tmp_path):
    refused(method, tmp_path / "less", tensors=lambda found: dict(sorted(found.items())[1:]))
    refused(method, tmp_path / "more", tensors=lambda found: {**found, "more": torch.zeros(2)})


@pytest.mark.parametrize("change", OF_NOTES)
@pytest.mark.parametrize("method", ["narrow", "prune", *slowly("quantize", "factorize")])
def test_notes_of_another_form_with_a_right_checksum_are_refused(method, change, tmp_path):
    assert re.match("(journal )?(note|unseen|errors)", refused(method, tmp_path, note=OF_NOTES[change]))


def test_a_note_of_a_layer_that_is_only_measured_is_refused(tmp_path):
    assert refused("spectra", tmp_path, note=lambda note: {"errors": {}}).startswith("note: expected nothing")
