"""T5 reads the weight of `wo` beside calling it, so that only the removal of layers makes it smaller."""

import pytest

from hf_cod import find_decoder_layers, plan_fit
from hf_cod.compression.fit.reach import fixed_share, left_by_bits, left_by_sparsity
from hf_cod.compression.fit.trials import Trials
from tests.tiny_models import build, build_encoder_decoder, seq2seq_batch


def load():
    return build_encoder_decoder("t5")


def test_shares_are_those_of_the_weights_that_can_change():
    stack = find_decoder_layers(load(), "encoder")
    named = [*stack.module_list.named_parameters()]
    matrices = {name: p for name, p in named if p.dim() == 2 and "bias" not in name}
    weights = sum(p.numel() for p in matrices.values())
    wo = sum(p.numel() for name, p in matrices.items() if name.endswith(".wo.weight"))
    stored = sum(p.nbytes for _, p in named)
    assert fixed_share(stack, "parameter_share") == wo / weights
    assert fixed_share(stack, "memory") == pytest.approx(4 * wo / stored)
    assert left_by_bits(stack, 3) == pytest.approx((wo + (weights - wo) * 3.127 / 32) / weights)
    packed = (wo + (weights - wo) * (0.2 + 1 / 32)) / weights
    assert left_by_sparsity(stack, 0.8) == pytest.approx(packed, rel=0.02)
    other = find_decoder_layers(build("llama"))
    assert fixed_share(other, "memory") == 0 and left_by_bits(other, 3) == 3.127 / 32


def test_a_budget_below_what_is_left_of_them_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(Trials, "measure", None)
    model, path = load(), {"layers_path": "encoder"}
    batches, stack = [seq2seq_batch(model)], find_decoder_layers(model, "encoder")
    fixed, bits = fixed_share(stack, "bits"), left_by_bits(stack, 3)
    # One of four layers, half of the rank, and three bits.
    least = 0.75 * (fixed + (0.5 - fixed) * (bits - fixed) / (1 - fixed))
    unit = 8 * sum(p.nbytes for p in stack.module_list.parameters()) / sum(map(stack.count_weights, range(4)))
    with pytest.raises(ValueError, match=r"^bits: .*, the least that depth, rank, bits can reach together") as got:
        plan_fit(load, "bits", 7.0, batches, batches, knobs=["depth", "rank", "bits"], **path)
    assert float(str(got.value).split()[4].rstrip(",")) == pytest.approx(least * unit, rel=1e-3)
    with pytest.raises(ValueError, match=r"^bits: expected at least 11\.\d+, the least that bits can reach, got 10"):
        plan_fit(load, "bits", 10.0, batches, batches, knobs=["bits"], **path)
