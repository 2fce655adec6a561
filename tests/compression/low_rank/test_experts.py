"""Factorized banks of experts: the formulas, what is counted and stored, and what works on the result."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod import (
    OwlBnbConfig,
    RankPlan,
    allocate,
    drop_experts,
    drop_layers,
    factorize,
    find_decoder_layers,
    heal,
    narrow,
    plan_ranks,
    prune,
    quantize,
    score_experts,
    score_layers,
)
from hf_cod.compression.low_rank.rank_plan import plan_of_allocation
from hf_cod.functional.expert_factorization import shared_expand, shared_reduce
from hf_cod.functional.factorization import DAMPING
from hf_cod.models.factors import LowRankExperts
from tests import references
from tests.compression.experts.test_merging import listed
from tests.fresh_processes import run_fresh
from tests.tiny_models import (
    MIXTURE_TYPES,
    batch_for,
    build,
    build_encoder_decoder,
    build_mixture,
    outputs,
    seq2seq_batch,
    unmapped_outputs,
)

KINDS = ("mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe")
BANK = "model.layers.1.mlp.experts"


def banks(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankExperts)}


def matrices(model):
    stack = find_decoder_layers(model)
    return {matrix.name: matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)}


def plan_for(model, basis, rank=4):
    """Ranks of the matrices of banks alone."""
    return RankPlan("parameter_share", 0.5, dict.fromkeys(matrices(model), rank), "mine", expert_basis=basis)


def moments_by_hand(X, rank_of_last):
    """(H of each expert, or None; what takes the place of None with factors of one's own) from its own tokens."""
    width = X[0].shape[1]
    H = [x.T @ x + torch.diag(x.square().sum(0)) * (width / len(x)) if 16 * len(x) >= width else None for x in X]
    x = torch.cat(X)
    common = x.T @ x + torch.diag(x.square().sum(0)) * (width / len(x))
    return H, torch.zeros_like(common) if rank_of_last else common


def by_hand(model, batch, rank, basis):
    """Layer by layer, with the layers before changed already; the products stand in the dense parameters."""
    stack = find_decoder_layers(model)
    for index in range(len(stack)):
        inputs = references.inputs_of_experts(model, batch)
        for experts in stack.expert_sets(index):
            for matrix in experts.matrices:
                last = matrix is experts.matrices[-1]
                X = [inputs[matrix.name, e][0].double() for e in range(matrix.experts)]
                H, instead = moments_by_hand(X, last)
                W = matrix.weights().clone()
                if basis == "own":
                    for e, each in enumerate(H):
                        each = instead if each is None else each
                        each, damping = (each, DAMPING) if each.any() else (torch.eye(len(each)).double(), 0)
                        matrix.write(e, references.whitened_svd(W[e], each, rank, damping)[0])
                else:  # the formulas have a test of their own
                    B, A = (shared_expand if last else shared_reduce)(W, rank, H)
                    for e, product in enumerate(B @ A):
                        matrix.write(e, product)
    return model


@pytest.mark.parametrize("basis", ["own", "shared"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_expert_by_its_own_tokens(kind, basis):
    model, intact = build_mixture(kind).double(), build_mixture(kind).double()
    for one in (model, intact):
        one.config._experts_implementation = "eager"  # the others know no float64
    batch = batch_for(model)
    report = factorize(model, plan_for(model, basis), batches=[batch], expert_basis=basis)
    expected = matrices(by_hand(intact, batch, 4, basis))
    assert banks(model).keys() == expected.keys() and report.settings["expert_basis"] == basis
    for name, module in banks(model).items():
        found = torch.stack([*module.unpack(torch.float64)])
        torch.testing.assert_close(found, expected[name].weights(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(outputs(model, batch), outputs(intact, batch), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("basis", ["own", "shared"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in KINDS else pytest.mark.families) for kind in MIXTURE_TYPES]
)
def test_all_weights_count_and_what_is_saved_is_what_runs(kind, basis, tmp_path):
    model = build_mixture(kind)
    stack, batch = find_decoder_layers(model), batch_for(model)
    before = sum(p.numel() for p in model.parameters())
    total = sum(stack.count_weights(index) for index in range(4))
    plan = plan_ranks(model, 0.6, batches=[batch], expert_basis=basis)
    report = factorize(model, plan, batches=[batch], expert_basis=basis)
    left = sum(p.numel() for p in model.parameters())
    assert report.results["parameters"] == {"intact": before, "factorized": left}
    kept = sum(stack.count_weights(index) for index in range(4))  # factors, and what is left
    assert before - left == total - kept and 0.59 < kept / total <= 0.6
    assert report.results["parameter_share"] == pytest.approx(kept / total)
    assert {name for name in plan.ranks if name in banks(model)} == banks(model).keys() != set()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(unmapped_outputs(again), unmapped_outputs(model))
    ids = batch["input_ids"]
    assert torch.equal(again.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


@pytest.mark.process
@pytest.mark.parametrize("kind, basis", [("mixtral", "own"), ("gpt_oss", "shared")])
def test_a_fresh_process_and_one_without_the_package(kind, basis, tmp_path):
    model = build_mixture(kind)
    factorize(model, 0.5, "plain", expert_basis=basis)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(banks(loaded)) == 8
    expected = outputs(loaded, {"input_ids": torch.arange(3, 12)[None]})
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    for start, options in (("import hf_cod", ""), ("sys.path.insert(0, 'hidden')", ", trust_remote_code=True")):
        code = (
            f"import sys, torch\n{start}\nfrom transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained('.'{options})\n"
            "print(type(model).__module__)\n"
            "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), 'logits.pt')\n"
        )
        done = run_fresh(code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("hf_cod." if not options else "transformers_modules.")
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("basis", ["own", "shared"])
@pytest.mark.parametrize("kind", ["gpt_oss", "dbrx"])
def test_matrices_of_low_rank_stay_as_they_are(kind, basis):
    """Factors of full rank save no weights, so these matrices have rank 4, with a factor in common."""
    model = build_mixture(kind)
    generator = torch.Generator().manual_seed(0)
    for matrix in matrices(model).values():
        (out, width), last = matrix.shape, matrix.key in ("down_proj", "w2")
        common = torch.randn(*((out, 4) if last else (4, width)), generator=generator) / 4
        for expert in range(matrix.experts):
            own = torch.randn(*((4, width) if last else (out, 4)), generator=generator) / 4
            matrix.write(expert, common @ own if last else own @ common)
    expected = outputs(model)
    report = factorize(model, plan_for(model, basis), batches=[batch_for(model)], expert_basis=basis)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
    assert max(report.layers["error"]) < 1e-9


def test_only_experts_with_tokens_are_multiplied(monkeypatch):
    model = build_mixture("mixtral")
    factorize(model, 0.5, "plain")
    asked, found = {}, []
    product = LowRankExperts.product

    def noted(self, tensors, x, expert):
        asked.setdefault(id(self), {})[expert] = len(x)
        return product(self, tensors, x, expert)

    monkeypatch.setattr(LowRankExperts, "product", noted)
    for name in ("eager", "grouped_mm", "batched_mm"):
        asked.clear()
        model.set_experts_implementation(name)
        outputs(model, {"input_ids": torch.tensor([[7]])})
        assert len(asked) == 8 and all(sum(rows.values()) == 2 == len(rows) for rows in asked.values())
        found.append(outputs(model))
    assert all(torch.allclose(one, found[0], atol=1e-5) for one in found)


def test_experts_without_tokens_are_noted(tmp_path):
    model = build_mixture("mixtral")
    batch = {"input_ids": torch.tensor([[5, 9, 20]])}
    report = factorize(model, plan_for(model, "own"), batches=[batch], journal=tmp_path)
    name = f"{BANK}.down_proj"
    (unseen,) = [note for note in report.notes if note.startswith("no token entered") and name in note]
    (few,) = [note for note in report.notes if note.startswith("fewer tokens than 1/16") and name in note]
    count = [int(note.split(" expert")[0].split()[-1]) for note in (unseen, few)]
    assert sum(count) <= 4 and unseen.endswith("method plain, or with the inputs of all experts of the bank")
    again = build_mixture("mixtral")
    resumed = factorize(again, plan_for(again, "own"), batches=[batch], journal=tmp_path)
    assert resumed.notes == report.notes and torch.equal(outputs(again), outputs(model))
    plain = build_mixture("mixtral")
    factorize(plain, plan_for(plain, "own"), "plain")
    routed = references.routed_experts(build_mixture("mixtral"), batch)[BANK]
    expert = next(e for e, (tokens, *_) in enumerate(routed) if not len(tokens))
    found, expected = (banks(one)[name] for one in (model, plain))
    torch.testing.assert_close([*found.unpack()][expert], [*expected.unpack()][expert])


def test_a_share_for_each_layer_and_for_each_matrix():
    model, batch = build_mixture("mixtral"), batch_for(build_mixture("mixtral"))
    scores = score_layers(model, method="depth")
    report = factorize(model, allocate(scores, "parameter_share", 0.5, 0.2), batches=[batch])
    assert report.layers["parameter_share"] == sorted(report.layers["parameter_share"], reverse=True)
    ranks = [report.results["ranks"][f"model.layers.{i}.mlp.experts.down_proj"] for i in range(4)]
    assert ranks == sorted(ranks, reverse=True) and len({*ranks}) == 4


def test_shared_experts_have_more_rank_at_the_same_number_of_weights():
    ranks = {}
    for basis in ("own", "shared"):
        model = build_mixture("mixtral")
        report = factorize(model, 0.5, "plain", expert_basis=basis)
        ranks[basis] = report.results["ranks"][f"{BANK}.down_proj"]
        assert 0.47 < report.results["parameter_share"] <= 0.5
    assert ranks["shared"] > ranks["own"]
    down, first = (banks(model)[f"{BANK}.{key}"] for key in ("down_proj", "gate_up_proj"))
    assert down.expand.dim() == first.reduce.dim() == 2 and down.reduce.dim() == first.expand.dim() == 3


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="expert_basis: expected own for a model without banks of experts, got shar"):
        factorize(build("llama"), 0.5, "plain", expert_basis="shared")
    with pytest.raises(ValueError, match="expert_basis: expected one of own, shared, got 'common'"):
        factorize(build("llama"), 0.5, "plain", expert_basis="common")
    with pytest.raises(ValueError, match="expert_basis: expected own with oats, which keeps banks, got shared"):
        factorize(build("llama"), 0.5, "oats", expert_basis="shared")
    model = build_mixture("mixtral")
    with pytest.raises(ValueError, match="expert_basis: expected shared, for which the plan has ranks, got own"):
        factorize(model, plan_for(model, "shared"), "plain")
    with pytest.raises(
        ValueError, match=rf"ranks: expected 1\.\.27 for {BANK[:12]}.*gate_up_proj, .* its 4 x 192 x 32, got 32"
    ):
        factorize(model, plan_for(model, "own", 32), "plain")
    factorize(model, 0.5, "plain")
    for change in (
        lambda: factorize(model, 0.4, "plain"),
        lambda: prune(model, 0.5, "magnitude"),
        lambda: narrow(model, 0.5, "magnitude", "none"),
        lambda: drop_experts(model, 0.5, batches=[batch_for(model)]),
    ):
        with pytest.raises(ValueError, match=f"expected dense matrices, got factors of experts in {BANK[:12]}"):
            change()
    model.config.module_shapes["layers.1.mlp.experts"]["down_proj.rank"] += 1
    with pytest.raises(ValueError, match=r"module_shapes: expected down_proj.rank \d+ of layers.1.mlp.experts"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["prune", "quantize"])
def test_other_matrices_can_still_be_changed(change, tmp_path):
    model, done = build_mixture("mixtral"), {"prune": prune, "quantize": quantize}[change]
    factorize(model, 0.5, "plain", include=["experts"])
    if change == "prune":
        with pytest.raises(ValueError, match="to prune the other matrices, exclude these"):
            prune(model, 0.5, "magnitude")
    before = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    how = {"exclude": ["experts"]}
    done(model, 0.5, "magnitude", **how) if change == "prune" else done(model, OwlBnbConfig(bits=4, **how))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model))


def test_oats_keeps_banks_and_counts_them():
    model = build("qwen2_moe")
    kept = [p.detach().clone() for p in model.parameters() if p.dim() == 3]
    report = factorize(model, 0.9, "oats", batches=[batch_for(model)])
    assert all(torch.equal(a, b) for a, b in zip(kept, (p for p in model.parameters() if p.dim() == 3), strict=True))
    assert report.results["parameter_share"] <= 0.9
    assert any("oats keeps banks of experts: model.layers.*.mlp.experts.gate_up_proj" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"at least 0.\d+ in layer \d \(rank 1 .*; banks of experts are excluded\)"):
        factorize(build("mixtral"), 0.5, "oats", batches=[batch_for(model)])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_factors_are_healed(method, tmp_path):
    student, teacher = build_mixture("mixtral"), build_mixture("mixtral")
    factorize(student, 0.6, batches=[batch_for(student)])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    windows = torch.randint(3, 99, (20, 12), generator=torch.Generator().manual_seed(5))
    sizes = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 12, "eval_samples": 4}
    report = heal(student, teacher, windows, method=method, steps=3, **sizes)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert any(name.endswith("down_proj.expand") for name in changed) == (method == "full")
    assert changed and report.results
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again), outputs(student))


def test_peft_scores_and_dropped_layers(tmp_path):
    model = build_mixture("mixtral")
    factorize(model, 0.5, "plain")
    scores = score_experts(model, method="reap", batches=[batch_for(model)])
    assert len(scores.values) == 4
    expected = outputs(model)
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    assert not torch.equal(outputs(adapted), expected)
    drop_layers(model, [1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(again.model.layers) == 3 and torch.equal(outputs(again), outputs(model))


def shares_by_expert(model, budget, batch=None):
    batches = [batch or batch_for(model)]
    experts = score_experts(model, method="frequency", batches=batches)
    alike, spread = score_layers(model, method="uniform"), min(budget, 1 - budget) / 2
    return allocate(alike, "parameter_share", budget, spread, expert_scores=experts)


def test_experts_in_a_list_have_ranks_of_their_own():
    """In a model whose matrices are all factorized, the share of each is that of its expert."""
    model = listed()
    plan = shares_by_expert(model, 0.5)
    ranks = plan_of_allocation(find_decoder_layers(model), plan).ranks
    for name, own in plan.experts.items():
        for expert, share in enumerate(own):
            rank = max(1, int(share * 32 * 8 / (32 + 8) + 1e-9))
            assert [ranks[f"{name}.expert_{expert}.{place}"] for place in (0, 2)] == [rank, rank]
    assert len({rank for name, rank in ranks.items() if ".expert_" in name}) > 2


def test_experts_in_a_list_keep_their_shares_beside_matrices_that_are_not_factorized(tmp_path):
    """NLLB-MoE reads the dtype of its fc2, so fc1 has the ranks for both."""
    model = build_encoder_decoder("nllb-moe")
    plan = shares_by_expert(model, 0.8, seq2seq_batch(model))
    intact = {name: p.numel() for name, p in model.named_parameters()}
    factorize(model, plan, "plain")
    for name, own in plan.experts.items():
        for expert, share in enumerate(own):
            module = model.get_submodule(f"{name}.expert_{expert}")
            kept = sum(p.numel() for p in module.parameters() if p.dim() == 2)
            whole = sum(intact[f"{name}.expert_{expert}.{key}.weight"] for key in ("fc1", "fc2"))
            one = 32 + module.fc1.bias.numel()
            assert share - one / whole <= kept / whole <= share + 1e-9
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(unmapped_outputs(again, seq2seq_batch(model)), unmapped_outputs(model, seq2seq_batch(model)))
    model = build_encoder_decoder("nllb-moe")
    with pytest.raises(ValueError, match=r"^plan: expected a share above 0.5 for .*fc1, beside matrices that are not"):
        factorize(model, shares_by_expert(model, 0.3, seq2seq_batch(model)), "plain")


def test_experts_of_a_bank_have_one_rank():
    model = build_mixture("mixtral")
    before = outputs(model)
    with pytest.raises(ValueError, match=r"^plan: expected granularity layer, block or module for experts in one par"):
        factorize(model, shares_by_expert(model, 0.5), "plain")
    assert torch.equal(outputs(model), before)
