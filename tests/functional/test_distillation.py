import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_cod.functional import distillation
from hf_cod.functional.distillation import IGNORED, hidden_loss, logit_loss


def by_hand(z, t, T=1.0, keep=None, labels=None, share=0.0):
    """One position after another, as the formula has it."""
    divergences, entropies = [], []
    for place in torch.cartesian_prod(*[torch.arange(n) for n in z.shape[:-1]]).tolist():
        place = tuple(place) if isinstance(place, list) else (place,)
        p, q = (t[place].double() / T).softmax(-1), (z[place].double() / T).softmax(-1)
        if keep is None or keep[place]:
            divergences.append(T**2 * (p * (p.log() - q.log())).sum())
        if labels is not None and labels[place] != IGNORED:
            entropies.append(cross_entropy(z[place].double()[None], labels[place][None]))
    loss = (1 - share) * torch.stack(divergences).mean() if divergences else z.sum() * 0
    return loss + share * torch.stack(entropies).mean() if share else loss


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    z, t = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64).mul(2).to(dtype) for _ in range(2))
    keep = torch.rand(2, 5, generator=generator) > 0.3
    labels = torch.randint(0, 11, (2, 5), generator=generator).masked_fill(~keep, IGNORED)
    return z.requires_grad_(), t, keep, labels


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 33, 10**6])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_against_the_formula(T, share, chunk, masked, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    z, t, keep, labels = case()
    keep = keep if masked else None
    found, expected = logit_loss(z, t, T, keep, labels, share), by_hand(z, t, T, keep, labels, share)
    torch.testing.assert_close(found, expected)
    (mine,), (theirs,) = torch.autograd.grad(3 * found, z), torch.autograd.grad(3 * expected, z)
    torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lambda z: logit_loss(z, t, T, keep, labels, share), z)


def test_bfloat16_is_computed_in_float32():
    z, t, keep, labels = case(torch.bfloat16)
    found = logit_loss(z, t, 2.0, keep, labels, 0.5)
    assert found.dtype == torch.float32
    wide = z.detach().float().requires_grad_()
    expected = by_hand(wide, t, 2.0, keep, labels, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (mine,), (theirs,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, wide)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), theirs, rtol=2**-8, atol=1e-6)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    z, *_ = case()
    loss = logit_loss(z, z.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and z.grad.abs().max() < 1e-12


def test_what_does_not_count_may_hold_anything():
    z, t, keep, _ = case()
    expected = logit_loss(z, t, keep=keep)
    broken = t.masked_fill(~keep[..., None], torch.nan)
    found = logit_loss(z, broken, keep=keep)
    assert torch.equal(found, expected)
    found.backward()
    assert z.grad.isfinite().all() and not z.grad[~keep].any()
    assert logit_loss(z, t, keep=torch.zeros_like(keep)).item() == 0
    forbidding = t.clone()
    forbidding[..., 4] = -torch.inf
    assert logit_loss(z, forbidding).isfinite()


def test_one_tensor_of_the_logits_size_beside_them(monkeypatch):
    """Counted from living storages: both logits, the gradient, and what a row needs."""
    from hf_cod.training.runs.memory import LiveStorages

    monkeypatch.setattr(distillation, "CHUNK", 1)
    z, t = torch.randn(64, 500, requires_grad=True), torch.randn(64, 500)
    with LiveStorages() as counter:
        logit_loss(z, t)
    assert 3 * z.nbytes <= counter.memory().total < 3.2 * z.nbytes


def test_hidden_states_against_the_formula():
    x, y, keep, _ = case()
    errors = [
        (x[place] - y[place]).square().sum() / y[place].square().sum()
        for place in ((i, j) for i in range(2) for j in range(5))
    ]
    torch.testing.assert_close(hidden_loss(x, y), torch.stack(errors).mean())
    some = [error for error, kept in zip(errors, keep.flatten(), strict=True) if kept]
    torch.testing.assert_close(hidden_loss(x, y, keep), torch.stack(some).mean())
    assert torch.autograd.gradcheck(lambda x: hidden_loss(x, y, keep), x)
    low = hidden_loss(x.bfloat16(), y.bfloat16(), keep)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(torch.stack(some).mean().item(), rel=0.02)


def test_bad_input():
    z, t, _, _ = case()
    for call, message in [
        (lambda: logit_loss(z, t[..., :7]), r"teacher: expected logits of \(2, 5, 11\), got \(2, 5, 7\)"),
        (lambda: logit_loss(z, t, 0.0), "temperature: expected a number above 0, got 0.0"),
        (lambda: logit_loss(z, t, share=1.5), r"label_weight: expected a share in 0..1, got 1.5"),
        (lambda: logit_loss(z, t, share=0.5), "labels: expected some for a share of 0.5, got none"),
        (lambda: hidden_loss(z, t[..., :7]), r"teacher: expected hidden states of \(2, 5, 11\), got"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
