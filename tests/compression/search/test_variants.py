"""Matrices at each value: those of the pruners and of the rounding, and the intact ones back."""

import pytest
import torch

from hf_cod import collect_statistics, find_decoder_layers
from hf_cod.compression.search.variants import Variants
from hf_cod.functional import codebook
from tests import references
from tests.tiny_models import build


def batches():
    return [{"input_ids": torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(3))}]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("pruner", ["wanda", "magnitude", "codebook"])
def test_matrices_are_those_of_the_pruner(pruner, family):
    """The naive masks; GPT-2 has transposed matrices, with equal weights, Mixtral a bank of experts."""
    model = build(family, layers=2).eval()
    stack = find_decoder_layers(model)
    with torch.no_grad():
        for _, W in stack.matrices(0):
            W.copy_((W * 50).round() / 50)
    intact = {name: W.clone() for i in range(2) for name, W in stack.matrices(i)}
    statistics = collect_statistics(model, batches())
    variants = Variants(stack, [*intact], pruner, None if pruner == "magnitude" else statistics)
    for value in (3.0, 4.0) if pruner == "codebook" else (0.0, 0.37, 0.8, 1.0):
        variants.put(dict.fromkeys(intact, value))
        for name, W in ((name, W) for i in range(2) for name, W in stack.matrices(i)):
            experts = [None] if W.dim() == 2 else range(len(W))
            for expert in experts:
                before, after = (m if expert is None else m[expert] for m in (intact[name], W))
                squares = statistics.of(name, expert)
                assert torch.equal(after, changed(before, value, pruner, squares)), (name, value)
    variants.restore()
    assert all(torch.equal(W, intact[name]) for i in range(2) for name, W in stack.matrices(i))


def changed(W, value, pruner, squares):
    if pruner == "codebook":
        return codebook.rounded(W, int(value), squares)
    if pruner == "magnitude" or squares is None:
        mask = references.magnitude_mask(W, value)
    else:
        mask = references.wanda_mask(W, squares.sqrt(), value)
    return W.masked_fill(mask, 0)


def test_memory_is_what_the_docstring_says():
    stack = find_decoder_layers(build("llama", layers=2))
    names = [name for i in range(2) for name in stack.input_shapes(i)]
    weights = sum(stack.count_weights(i) for i in range(2))
    statistics = collect_statistics(stack.model, batches())
    assert Variants(stack, names, "wanda", statistics).bytes == weights * (4 + 2)
    assert Variants(stack, names, "magnitude", None).bytes == weights * (4 + 4) - 2 * sum(
        W.numel() for i in range(2) for _, W in stack.matrices(i) if W.numel() < 2**15
    )
    assert Variants(stack, names, "codebook", statistics).bytes == weights * 3 * 4
