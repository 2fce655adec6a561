"""Weights in files: the same results as in memory, and pages that the system can drop."""

import re
from pathlib import Path

import pytest
import torch

from hf_cod import prune, quantize
from hf_cod.io.file_memory import merged, move_to_file, pages_of, weights_in_files
from hf_cod.io.models import load_model
from tests.tiny_models import build, two_batches


def anonymous_bytes():
    """Bytes of this process that no file holds."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_a_moved_tensor_keeps_its_values_address_and_views(tmp_path):
    W = torch.randn(3000, 1000)
    expected, address, view = W.clone(), W.data_ptr(), W.t()
    before = anonymous_bytes()
    with weights_in_files(tmp_path, 1 << 40):
        move_to_file([W, view, W[:10]])
    assert before - anonymous_bytes() > 0.9 * W.nbytes
    assert torch.equal(W, expected) and W.data_ptr() == address and torch.equal(view, expected.t())
    W[5] = 0  # a private change, as of any other tensor
    assert not W[5].any() and torch.equal(W[6:], expected[6:])
    assert not list(tmp_path.iterdir())


def test_nothing_moves_outside_the_block():
    W = torch.randn(1000, 1000)
    before = anonymous_bytes()
    move_to_file([W])
    assert abs(anonymous_bytes() - before) < W.nbytes / 2


def test_pages_lie_within_the_tensor():
    W = torch.zeros(5000)
    start, end = pages_of(W[1:])
    assert W.data_ptr() < start < end <= W.data_ptr() + W.nbytes
    assert pages_of(torch.zeros(3)) == pages_of(W[::2]) == pages_of(torch.empty(0)) == (0, 0)
    assert merged([(8, 12), (0, 4), (2, 6), (6, 8)]) == [(0, 6), (6, 8), (8, 12)]


METHODS = {
    "magnitude": lambda model, **told: prune(model, 0.5, method="magnitude", journal=told["journal"]),
    "wanda": lambda model, **told: prune(model, 0.5, **told),
    "sparsegpt": lambda model, **told: prune(model, 0.5, method="sparsegpt", **told),
    "rounded": lambda model, **told: quantize(model, bits=3.5, journal=told["journal"]),
    "compensated": lambda model, **told: quantize(model, bits=3.5, **told),
}


class Killed(BaseException):
    """What ends a run in the middle."""


CASES = [
    *(("llama", "magnitude"), ("llama", "compensated"), ("gpt2", "wanda"), ("gemma3", "rounded")),
    *(("mixtral", "sparsegpt"), ("mixtral", "rounded")),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_files_are_those_of_the_work_in_memory(method, kind, tmp_path, monkeypatch):
    from hf_cod.io import file_memory

    monkeypatch.setattr(file_memory, "_LEAST", 1)  # tiny matrices move, too
    wide = {"n_embd": 128} if kind == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    build(kind, **wide).save_pretrained(tmp_path / "intact")
    model = _load(tmp_path / "intact")
    batches = two_batches(model)
    METHODS[method](model, batches=batches, journal=tmp_path / "in-memory")
    model.save_pretrained(tmp_path / "expected")
    moved = []
    for stop in (1, 2, 3, None):
        model = _load(tmp_path / "intact")
        with weights_in_files(tmp_path, 1), monkeypatch.context() as patch:
            patch.setattr("hf_cod.layers.finished_layers.move_to_file", _killing(stop, moved))
            try:
                METHODS[method](model, batches=batches, journal=tmp_path / "journal")
                model.save_pretrained(tmp_path / "got")
            except Killed:
                assert stop is not None
    assert any(end > start for start, end in moved)
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "got" / file.name).read_bytes() == file.read_bytes(), file.name


def _load(directory):
    return load_model(str(directory), device="cpu")[0]


def _killing(stop, moved):
    """`move_to_file` that ends the run at its call number `stop`."""
    calls = []

    def move(tensors):
        tensors = list(tensors)
        move_to_file(tensors)
        moved.extend(map(pages_of, tensors))
        calls.append(1)
        if len(calls) == stop:
            raise Killed

    return move
