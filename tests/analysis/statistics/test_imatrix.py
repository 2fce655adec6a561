"""Importance matrices of llama.cpp: written, read, and what is refused."""

import logging
import re

import gguf
import numpy as np
import pytest
import torch

from hf_cod import LayerStatistics, collect_statistics, find_decoder_layers, score_layers
from hf_cod.analysis.statistics.imatrix import sums_of, write_imatrix
from hf_cod.io.gguf_file import read_gguf, write_gguf
from tests.tiny_models import build, two_batches


@pytest.fixture(scope="module")
def llama():
    model = build("llama", layers=2)
    return model, collect_statistics(model, two_batches(model, "right"))


def test_the_file_is_that_of_llama_imatrix(llama, tmp_path):
    model, statistics = llama
    read = gguf.GGUFReader(statistics.save(tmp_path / "imatrix.gguf", model=model))
    assert read.get_field("general.type").contents() == "imatrix"
    assert read.get_field("imatrix.chunk_count").contents() == 1
    assert read.get_field("imatrix.chunk_size").contents() == 512
    assert "hf_cod" in read.get_field("imatrix.datasets").contents()[0]
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    assert len(tensors) == 2 * 7 * 2
    name = "model.layers.1.self_attn.o_proj"
    sums, counts = (tensors[f"blk.1.attn_output.weight.{key}"] for key in ("in_sum2", "counts"))
    assert np.array_equal(sums, statistics.squares[name].float().numpy()[None])
    assert counts.tolist() == [[float(statistics.tokens[name])]]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "deepseek_v3"])
def test_owl_by_an_importance_matrix_is_that_by_statistics(family, tmp_path, caplog):
    model = build(family, layers=2)
    statistics = collect_statistics(model, two_batches(model, "right"))
    statistics.save(tmp_path / "imatrix.gguf", model=model)
    read = LayerStatistics.load(tmp_path / "imatrix.gguf", model=model)
    assert (read.model, read.layers_path) == (statistics.model, statistics.layers_path)
    for name, sums in statistics.squares.items():
        torch.testing.assert_close(read.squares[name], sums, rtol=1e-6, atol=0)
        assert torch.equal(read.tokens[name], statistics.tokens[name]), name
    assert score_layers(model, read, "owl").values == score_layers(model, statistics, "owl").values
    assert not caplog.records


def rewritten(path, change):
    """The file with other tensors."""
    file = read_gguf(path, "file")
    tensors = {name: tensor.copy() for name, tensor in file.tensors.items()}
    change(tensors)
    return write_gguf(path, file.keys, tensors)


def test_matrices_with_one_input_share_an_entry(llama, tmp_path, caplog):
    model, statistics = llama
    path = statistics.save(tmp_path / "imatrix.gguf", model=model)

    def drop(tensors):
        for key in ("in_sum2", "counts"):
            tensors[f"blk.0.attn_qkv.weight.{key}"] = tensors[f"blk.0.attn_q.weight.{key}"]
            for name in ("attn_q", "attn_k", "attn_v", "ffn_up"):
                del tensors[f"blk.0.{name}.weight.{key}"]

    read = LayerStatistics.load(rewritten(path, drop), model=model)
    for name, sums in statistics.squares.items():
        torch.testing.assert_close(read.squares[name], sums, rtol=1e-6, atol=0)
    assert not caplog.records


def test_what_is_missing_and_what_is_unknown_is_named(llama, tmp_path, caplog):
    model, statistics = llama
    path = statistics.save(tmp_path / "imatrix.gguf", model=model)

    def change(tensors):
        for key in ("in_sum2", "counts"):
            tensors[f"output.weight.{key}"] = tensors.pop(f"blk.1.ffn_down.weight.{key}")

    read = LayerStatistics.load(rewritten(path, change), model=model)
    assert read.unseen == {"model.layers.1.mlp.down_proj": []}
    assert [record.getMessage() for record in caplog.records] == [
        "statistics: no entry for 1 of 14 matrices: model.layers.1.mlp.down_proj",
        "statistics: 1 entries are of no matrix of the layers: output.weight",
    ]
    assert len(score_layers(model, read, "owl").values) == 2


def test_matrices_without_a_name_are_left_out_with_a_warning(tmp_path, caplog):
    model = build("qwen2_moe", layers=2)  # the second layer has a dense MLP, which qwen2moe of GGUF does not have
    statistics = collect_statistics(model, two_batches(model))
    with caplog.at_level(logging.WARNING):
        statistics.save(tmp_path / "imatrix.gguf", model=model)
    assert re.match("imatrix: 3 matrices have no name in GGUF and are left out: .*gate_proj, ", caplog.messages[0])
    assert "blk.1.attn_q.weight.in_sum2" in read_gguf(tmp_path / "imatrix.gguf", "file").tensors


def test_experts_in_a_list(tmp_path):
    """A list of experts is one tensor in GGUF."""
    model = build("llama", layers=1)
    model.model.layers[0].block_sparse_moe = torch.nn.Module()
    model.model.layers[0].block_sparse_moe.experts = torch.nn.ModuleList(
        torch.nn.ModuleDict({"w1": torch.nn.Linear(32, 48), "w2": torch.nn.Linear(48, 32)}) for _ in range(3)
    )
    stack = find_decoder_layers(model)
    squares = {n: torch.rand(shape).double() for n, shape in stack.input_shapes(0).items()}
    tokens = {n: torch.tensor(i) for i, n in enumerate(squares)}
    path = write_imatrix(tmp_path / "imatrix.gguf", stack, squares, tokens)
    assert read_gguf(path, "file").tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape == (3, 48)
    read, counts = sums_of(path, stack)
    for name, sums in squares.items():
        torch.testing.assert_close(read[name], sums, rtol=1e-6, atol=0)
        assert counts[name] == tokens[name]


BAD = {
    "blk.0.attn_q.weight.in_sum2: expected finite sums of squares, got nan to nan": (
        lambda t: t["blk.0.attn_q.weight.in_sum2"].fill(np.nan)
    ),
    "blk.0.attn_q.weight.in_sum2: expected finite sums of squares, got -1 to -1": (
        lambda t: t["blk.0.attn_q.weight.in_sum2"].fill(-1)
    ),
    "blk.0.attn_q.weight.counts: expected counts, got 0.5 to 0.5": lambda t: t["blk.0.attn_q.weight.counts"].fill(0.5),
    "blk.0.attn_q.weight.counts: expected counts, got inf to inf": (
        lambda t: t["blk.0.attn_q.weight.counts"].fill(np.inf)
    ),
    "statistics: expected NAME.in_sum2 and NAME.counts, got no blk.0.attn_q.weight.counts": (
        lambda t: t.pop("blk.0.attn_q.weight.counts")
    ),
    "statistics: expected NAME.in_sum2 and NAME.counts, got no blk.0.attn_q.weight.in_sum2": (
        lambda t: t.pop("blk.0.attn_q.weight.in_sum2")
    ),
    "statistics: expected NAME.in_sum2 and NAME.counts, got no tensors": lambda t: t.clear(),
    "blk.0.attn_q.weight.counts: expected one count for each row of in_sum2": (
        lambda t: t.update({"blk.0.attn_q.weight.counts": np.ones(2, np.float32)})
    ),
    r"blk.0.attn_q.weight.in_sum2: expected shape \(32,\) as the inputs of model.layers.0.self_attn.q_proj": (
        lambda t: t.update({"blk.0.attn_q.weight.in_sum2": np.ones((1, 40), np.float32)})
    ),
    "statistics: expected entries of the model's layers, got a.weight": (
        lambda t: [t.update({f"a.weight.{k.split('.')[-1]}": v, k: v}) or t.pop(k) for k, v in [*t.items()]]
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_files(llama, tmp_path, said):
    model, statistics = llama
    path = rewritten(statistics.save(tmp_path / "imatrix.gguf", model=model), BAD[said])
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        LayerStatistics.load(path, model=model)
    assert "\n" not in str(caught.value) and repr(str(path)) in str(caught.value)


def test_bad_calls(llama, tmp_path):
    model, statistics = llama
    path = tmp_path / "imatrix.gguf"
    for call in (lambda: statistics.save(path), lambda: LayerStatistics.load(path)):
        with pytest.raises(ValueError, match=r"^model: expected the model of the statistics for a \.gguf file, got"):
            call()
    with pytest.raises(ValueError, match=r"^statistics: expected those of LlamaForCausalLM, with"):
        statistics.save(path, model=build("llama", layers=3))
    with pytest.raises(ValueError, match="which does not exist"):
        LayerStatistics.load(path, model=model)
    write_gguf(path, {"general.type": "model"}, {})
    with pytest.raises(ValueError, match=r"^statistics: expected an importance matrix .*, got 'model' in "):
        LayerStatistics.load(path, model=model)
    with pytest.raises(ValueError, match=r"^statistics: expected those of LlamaForCausalLM, with"):
        LayerStatistics.load(statistics.save(tmp_path / "s.safetensors"), model=build("llama", layers=3))
    huge = LayerStatistics(statistics.model, statistics.layers_path, dict(statistics.squares), statistics.tokens)
    huge.squares["model.layers.0.mlp.up_proj"] = torch.full((32,), 1e60, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^blk.0.ffn_up.weight: expected sums of squares within float32, got 1e\+60"):
        huge.save(path, model=model)
