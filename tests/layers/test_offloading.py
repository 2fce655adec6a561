"""Models whose weights stay in files: the results of the work in memory, killed or not, with one layer in memory."""

import pytest
import torch

from hf_cod import factorize, find_decoder_layers, narrow, plan_ranks, prune, quantize, score_layers
from hf_cod.io import offloaded_checkpoint
from hf_cod.io.models import load_model
from hf_cod.io.offloaded_checkpoint import save_offloaded
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.hidden_states import HiddenStates
from hf_cod.layers.offloading import in_memory
from hf_cod.layers.size import bytes_of, count_parameters
from hf_cod.scoring.settings import METHODS as METHODS_OF_SCORES
from tests.tiny_models import build, two_batches

METHODS = {
    "magnitude": lambda model, batches, journal: prune(model, 0.5, method="magnitude", journal=journal),
    "wanda": lambda model, batches, journal: prune(model, 0.5, method="wanda", batches=batches, journal=journal),
    "compensated": lambda model, batches, journal: quantize(model, bits=3.5, batches=batches, journal=journal),
}
CASES = [("llama", "wanda"), ("llama_tied", "compensated"), ("gpt2", "wanda"), ("gemma3", "magnitude")]


class Killed(BaseException):
    """What ends a run in the middle."""


def in_files(directory, **settings):
    return load_model(str(directory), device="cpu", in_files=True, **settings)[0]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_files_are_those_of_the_work_in_memory(kind, method, tmp_path, monkeypatch):
    wide = {"n_embd": 128} if kind == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    build(kind, **wide).to(torch.bfloat16).save_pretrained(tmp_path / "intact")
    model = load_model(str(tmp_path / "intact"), device="cpu")[0]
    size, batches = bytes_of(model), two_batches(model)
    expected = METHODS[method](model, batches, tmp_path / "expected-journal")
    model.save_pretrained(tmp_path / "expected")
    held = []
    for stop in (1, 3, None):
        monkeypatch.undo()
        model = in_files(tmp_path / "intact")
        assert bytes_of(model) == size and all(p.is_meta for p in model.parameters())
        monkeypatch.setattr(FinishedLayers, "add", killing(stop, model, held))
        try:
            found = METHODS[method](model, batches, tmp_path / "journal")
        except Killed:
            assert stop is not None
            own = (p for name, p in model.named_parameters() if method != "compensated" or ".layers." not in name)
            assert all(p.is_meta for p in own), "a failure drops what was read"
    assert all(p.is_meta for p in model.parameters())
    assert held and max(held) <= 1, "layers in memory"
    assert (found.layers, found.results, found.notes) == (expected.layers, expected.results, expected.notes)
    save_offloaded(model, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(tmp_path / "expected")
    assert {p.name for p in (tmp_path / "journal").iterdir()} == {
        p.name for p in (tmp_path / "expected-journal").iterdir()
    }, "a run in memory resumes one in files"


def killing(stop, model, held):
    """`FinishedLayers.add` that ends the run at its call number `stop`; `held` gets the numbers of layers in memory."""
    add, calls = FinishedLayers.add, []

    def adding(self, index, note):
        stack = find_decoder_layers(model)
        held.append(sum(not all(p.is_meta for p in layer.parameters()) for layer in stack))
        add(self, index, note)
        calls.append(index)
        if len(calls) == stop:
            raise Killed

    return adding


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_shards_and_outputs_are_those_of_the_model_in_memory(dtype, tmp_path, monkeypatch):
    build("llama_tied").save_pretrained(tmp_path / "intact", max_shard_size="20KB")
    model = load_model(str(tmp_path / "intact"), device="cpu", dtype=dtype)[0]
    model.save_pretrained(tmp_path / "expected", max_shard_size="30KB")
    files = in_files(tmp_path / "intact", dtype=dtype)
    ids = {"input_ids": torch.arange(20)[None]}
    with torch.no_grad():
        assert torch.equal(files(**ids).logits, model(**ids).logits)
    monkeypatch.setattr(offloaded_checkpoint, "SHARD_SIZE", "30KB")
    save_offloaded(files, tmp_path / "got")
    assert count_parameters(files) == count_parameters(model)
    assert contents(tmp_path / "got") == contents(tmp_path / "expected")
    assert len(list((tmp_path / "got").glob("*.safetensors"))) > 1


def test_hidden_states_are_in_files_until_the_work_ends(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "intact")
    model, found, own = in_files(tmp_path / "intact"), [], HiddenStates.__setitem__

    def keeping(self, number, state):
        own(self, number, state)
        kept = self[number]
        assert torch.equal(kept[0], state[0]) and kept[1] == state[1] and not self._states[number][0].numel()
        found.append(len(list((tmp_path / "journal").glob("*-scratch/*"))))

    monkeypatch.setattr(HiddenStates, "__setitem__", keeping)
    batches = two_batches(model)
    stale = tmp_path / "journal"
    METHODS["wanda"](model, batches, stale)
    runs = len(find_decoder_layers(model)) - 1
    assert found == [1, 2] + [2, 2] * (runs - 1) and not list(stale.glob("*-scratch"))


def test_a_change_in_memory_is_lost_and_the_files_stay_as_they_are(tmp_path):
    build("llama").save_pretrained(tmp_path)
    before, model = contents(tmp_path), in_files(tmp_path)
    layer = find_decoder_layers(model)[0]
    with in_memory(layer), torch.no_grad():
        layer.mlp.up_proj.weight.zero_()
        assert not layer.mlp.up_proj(torch.ones(1, 32)).any(), "a forward pass uses what is in memory"
    assert layer.mlp.up_proj.weight.is_meta and layer.mlp.up_proj(torch.ones(1, 32)).any()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", METHODS_OF_SCORES)
def test_a_score_in_files_is_that_in_memory_or_refused(method, tmp_path):
    build("llama").save_pretrained(tmp_path)
    model, files = load_model(str(tmp_path), device="cpu")[0], in_files(tmp_path)
    batches = two_batches(model)
    if method in ("sensitivity", "kl", "auto"):
        with pytest.raises(ValueError, match="expected weights in memory, got offloaded ones"):
            score_layers(files, method=method, batches=batches)
    elif method in ("gradient_norm", "fisher"):
        with pytest.raises(ValueError, match="expected "):
            score_layers(files, method=method, batches=batches)
    else:
        found, expected = (score_layers(each, method=method, batches=batches) for each in (files, model))
        assert found.values == expected.values


def test_other_changes_than_those_of_layers_one_by_one_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    batches = two_batches(in_files(tmp_path))
    for change in (
        lambda model: factorize(model, plan_ranks(model, 0.8, batches=batches), batches=batches),
        lambda model: narrow(model, 0.8, batches=batches),
    ):
        with pytest.raises(ValueError, match=r"expected .*weights in memory"):
            change(in_files(tmp_path))


def test_what_cannot_stay_in_files_is_refused(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match=r"max_memory: expected a checkpoint with the tensors of the model"):
        in_files(tmp_path / "mixture")
    model = build("llama")
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"journal: expected a directory for a model whose weights stay in files"):
        prune(in_files(tmp_path / "llama"), 0.5, method="magnitude")
    with pytest.raises(ValueError, match=r"max_memory: expected device cpu, got meta"):
        load_model(str(tmp_path / "llama"), device="meta", in_files=True)
    torch.save(model.state_dict(), tmp_path / "llama" / "pytorch_model.bin")
    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"max_memory: expected a checkpoint in safetensors"):
        in_files(tmp_path / "llama")
