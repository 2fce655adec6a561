"""What work needs whose weights stay in files, against sums by hand."""

import gc

import pytest
import torch

from hf_cod import find_decoder_layers
from hf_cod.io.models import load_model
from hf_cod.layers.memory_limit import FIXED, Copies, MemoryLimit, above_limit, memory_need, peak_bytes
from tests.tiny_models import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_need_is_that_of_the_shapes(dtype, tmp_path):
    made = build("llama", hidden_size=64, intermediate_size=96).to(dtype)
    made.save_pretrained(tmp_path)
    size = dtype.itemsize
    layer = size * sum(p.numel() for p in made.model.layers[0].parameters())
    head = size * made.lm_head.weight.numel()
    model = load_model(str(tmp_path), device="cpu", in_files=True)[0]
    batches = [{"input_ids": torch.ones(2, 5, dtype=torch.long)}, {"input_ids": torch.ones(1, 7, dtype=torch.long)}]
    weights = memory_need(find_decoder_layers(model), batches, Copies(3))
    assert weights.layer == layer and weights.sums == 0 and weights.copies == 3 * 64 * 96
    assert weights.others == head + 12 * 10 * len(made.lm_head.weight)
    rows = sum(p.shape[0] for p in made.model.layers[0].parameters() if p.dim() == 2)
    assert weights.outputs == 2 * size * 10 * rows
    assert weights.total == weights.process + FIXED + max(layer + max(3 * 64 * 96, weights.outputs), weights.others)
    products = memory_need(find_decoder_layers(model), batches, Copies(14, products=True))
    assert products.sums == 4 * (3 * 64**2 + 96**2), "q, k and v have one input, gate and up another one"
    assert products.copies == max(14 * 64 * 96 + 4 * 96**2, 4 * 64 * 96 + 12 * 96**2)
    assert all(p.is_meta for p in model.parameters()), "no weights are read"
    products.check(products.total)
    with pytest.raises(
        ValueError, match=r"^max_memory: expected at least \d\.\d\dGB, got .* GB the largest layer, .*\)$"
    ):
        products.check(products.total - 1)


def test_the_peak_stays_when_memory_is_freed():
    before = peak_bytes()
    held = torch.ones(before // 4)  # float32: as much as the peak so far
    reached = peak_bytes()
    del held
    gc.collect()
    assert reached >= before * 1.5 and peak_bytes() > 0.99 * reached  # the system counts in batches of pages


def test_a_peak_above_the_limit_is_a_note():
    told = {"limit_bytes": 2 * 10**9, "needed_bytes": 10**9, "peak_bytes": 2 * 10**9}
    assert above_limit({}) == above_limit({"memory_limit": told}) == []
    assert MemoryLimit(None).results() == {}
    (note,) = above_limit({"memory_limit": {**told, "limit_bytes": 10**9}})
    assert "took 2.00 GB, more than max_memory, 1.00 GB; 1.00 GB were expected" in note
