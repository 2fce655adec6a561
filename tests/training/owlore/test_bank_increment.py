"""Increments of banks of experts against one matrix at a time: what they add, learn, fold and lose."""

import copy

import pytest
import torch
from peft import get_peft_model

from hf_cod import OwLoreAdamW, OwLoreConfig, find_decoder_layers
from hf_cod.training.owlore.bank_increment import BankIncrement
from tests.tiny_models import build_mixture
from tests.training.owlore.references import galore

EXPERTS, OUT, IN = 3, 12, 8


def exact_bases(G, r, generator):
    """Of a full SVD, of each matrix."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[..., :r, :].mT if G.shape[-2] >= G.shape[-1] else U[..., :r]


def filled(m=OUT, n=IN, rank=2, max_rank=3):
    """With a folded update of rank 3 and a current one."""
    increment = BankIncrement(n, m, rank, max_rank, dtype=torch.float64, experts=(EXPERTS,))
    increment.B, increment.A = torch.randn(EXPERTS, m, 3).double(), torch.randn(EXPERTS, 3, n).double()
    increment.P = torch.linalg.qr(torch.randn(EXPERTS, min(m, n), rank).double()).Q
    increment.N.data = torch.randn(increment.shape).double()
    return increment


def by_hand(increment, expert):
    """D of one expert."""
    N, P, A, B = (getattr(increment, name)[expert].detach() for name in "NPAB")
    return B @ A + (N @ P.T if len(N) == increment.B.shape[1] else P @ N)


@pytest.mark.parametrize("m, n", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_expert_gets_its_own_sum(m, n, turned, dtype):
    """Computed in the dtype of the increment, and rounded once."""
    increment, W = filled(m, n), torch.randn(EXPERTS, m, n).to(dtype)
    stored = increment(W.mT.contiguous() if turned else W, turned)
    for expert in range(EXPERTS):
        expected = (W[expert].double() + by_hand(increment, expert)).to(dtype)
        torch.testing.assert_close(stored[expert].T if turned else stored[expert], expected)


def test_what_folding_loses_is_the_sum_over_the_experts():
    increment = filled()
    before = [by_hand(increment, expert) for expert in range(EXPERTS)]
    increment.fold()
    assert increment.A.shape == (EXPERTS, 3, IN) and not increment.has_basis
    lost = kept = 0.0
    for expert, whole in enumerate(before):
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(increment.B[expert] @ increment.A[expert], U[:, :3] * S[:3] @ Vh[:3])
        lost, kept = lost + float(S[3:].square().sum()), kept + float(S[:3].square().sum())
    assert float(increment.lost) == pytest.approx(lost, rel=1e-6)
    assert increment.lost_energy() == pytest.approx(lost / (lost + kept), rel=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_one_interval_is_galore_for_each_expert(kind, monkeypatch):
    """Of the full gradient of the bank, for both orientations; an expert without a token does not move.

    Moments of an expert begin with the interval, not with its first token.
    """
    monkeypatch.setattr("hf_cod.training.owlore.bank_increment.gradient_basis", exact_bases)
    monkeypatch.setattr("hf_cod.training.owlore.increment.gradient_basis", exact_bases)
    base = build_mixture(kind).double().train()
    base.set_experts_implementation("eager")  # the others know no float64
    model = get_peft_model(copy.deepcopy(base), OwLoreConfig(r=1))  # a first token determines one direction
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=50)
    states, late = {}, 0
    for step in range(5):
        ids = torch.randint(3, 99, (1, 2 + step), generator=torch.Generator().manual_seed(step))
        whole = merged(model).requires_grad_(True)
        for one in (whole, model):
            one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = banks_of(merged(model))
        for name, matrix in banks_of(whole).items():
            gradients = matrix.parameter.grad.mT if matrix.transposed else matrix.parameter.grad
            for expert, G in enumerate(gradients):
                W, first = matrix.read(expert).detach(), (name, expert) not in states and bool(G.any())
                if first:
                    states[name, expert] = {"t": step}
                    late += step > 0
                state = states.get((name, expert))
                expected = W if state is None else galore(W, G, state, 1e-2, 1, first, 1.0)
                torch.testing.assert_close(after[name].read(expert).detach(), expected, atol=1e-8, rtol=0)
    assert late


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


def banks_of(model):
    stack = find_decoder_layers(model)
    return {matrix.name: matrix for index in range(4) for matrix in stack.expert_matrices(index)}
