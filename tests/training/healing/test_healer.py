"""Healing through the public door, on tiny models."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_cod import (
    HealSettings,
    RankPlan,
    drop,
    factorize,
    find_decoder_layers,
    heal,
    pack_sparse,
    prune,
    score_layers,
    token_batches,
)
from hf_cod.io.packing import pack
from hf_cod.layers.checks import pruned_matrices
from hf_cod.models.factors import LowRankLinear
from hf_cod.training.healing.distillation_trainer import DistillationTrainer
from hf_cod.training.healing.healed import recovered_share
from hf_cod.training.healing.objective import Objective
from hf_cod.training.healing.pair import check_tokenizers
from hf_cod.training.healing.settings import count_tokens
from hf_cod.training.healing.zeros import kept_at_zero
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import METHODS
from tests.fresh_processes import run_fresh
from tests.tiny_models import batch_for, build
from tests.tiny_tokenizers import bert_like, gpt_like

WEIGHTS_TRAIN = [name for name, method in METHODS.items() if not method.adapters]
SAMPLING = OwLoreSettings(n_active=2, interval=3, rank=8)
# Method -> those of its settings that it uses.
SAMPLING_OF = {
    **dict.fromkeys(("owlore", "owlore-peft"), SAMPLING),
    "lisa": OwLoreSettings(n_active=2, interval=3),
    "galore": OwLoreSettings(interval=3, rank=8),
}
WINDOWS = torch.randint(3, 99, (20, 12), generator=torch.Generator().manual_seed(5))


def settings(method, **changes):
    values = {"method": method, "steps": 6, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 12}
    values |= {"eval_samples": 4, "save_every": 100, "log_every": 2, "learning_rate": 1e-2}
    values |= {"lora_rank": 4} if method == "lora" else {}
    return HealSettings(**{**values, **changes})


def healed(student, teacher, method="full", output=None, **changes):
    sampling = SAMPLING_OF.get(method)
    return heal(student, teacher, WINDOWS, settings(method, **changes), sampling=sampling, output=output)


def pruned(dtype=torch.float32):
    model = build("llama", dtype=dtype)
    prune(model, 0.6, "magnitude")
    return model


def factorized():
    """Some matrices of a name are factorized, and some are not."""
    model = build("llama")
    names = [
        f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    factorize(model, RankPlan("parameter_share", 0.8, dict.fromkeys(names, 8), "mine"), "plain")
    return model


def learnt(report):
    """Whether the distance from the teacher fell; perplexity means nothing where tokens are random."""
    losses = [loss for _, loss in report.results["curve"]]
    return losses[-1] < losses[0]


def zeros_of(model):
    stack = find_decoder_layers(model)
    return {n: module.weight == 0 for i in range(len(stack)) for n, module in stack.linears(i).items()}


@torch.no_grad()
def logits(model):
    return model.eval()(**batch_for(model)).logits


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_leaves_the_models_as_they_were(method):
    student, teacher = factorized().train(), build("llama")
    intact = [p.detach().clone() for p in teacher.parameters()]
    modules, shapes = [type(m) for m in student.modules()], copy.deepcopy(student.config.module_shapes)
    report = healed(student, teacher, method)
    assert learnt(report) and all(value > 1 for value in report.results["perplexity"].values())
    assert report.kind == "heal" and report.results["tokens"] == 6 * 4 * 12
    assert modules == [type(m) for m in student.modules()] and shapes == student.config.module_shapes
    assert student.config.use_cache and teacher.config.use_cache, "Trainer turns it off"
    assert all(m.training for m in student.modules()) and all(p.requires_grad for p in student.parameters())
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    assert all(torch.equal(a, b) for a, b in zip(intact, teacher.parameters(), strict=True))
    assert not hasattr(student, "peft_config") and not any("lora" in n or "owlore" in n for n in student.state_dict())


@pytest.mark.parametrize("method, dtype", [*((m, torch.float32) for m in WEIGHTS_TRAIN), ("lora", torch.float32)])
def test_zeros_stay_zeros(method, dtype):
    student = pruned(dtype)
    before, weights = zeros_of(student), copy.deepcopy(student.state_dict())
    report = healed(student, build("llama"), method)
    assert learnt(report) and "weights, including zeros, 100.0% of the teacher's" in report.summary[1]
    for name, zeros in zeros_of(student).items():
        assert (zeros >= before[name]).all() and float(zeros.float().mean()) == pytest.approx(0.6, abs=0.02), name
    changed = [
        name for name in before if not torch.equal(weights[f"{name}.weight"], student.state_dict()[f"{name}.weight"])
    ]
    assert len(changed) >= len(before) // 2


def test_zeros_of_experts_stay_zeros_beside_adapters():
    """One parameter of the banks has zeros, the other has none; both have adapters, the one around the other."""
    student, teacher = build("mixtral"), build("mixtral")
    banks = [matrix for i in range(4) for matrix in find_decoder_layers(student).expert_matrices(i)]
    prune(student, 0.6, "magnitude", include=["down_proj"])
    before = {matrix.name: matrix.weights().clone() for matrix in banks}
    report = healed(student, teacher, "lora")
    assert learnt(report)
    assert "24 matrices, 8 of them in banks of experts, with adapters: 86,016 of 86,016" in report.notes[0]
    for matrix in banks:
        zeros, weights = before[matrix.name] == 0, matrix.weights()
        assert bool(zeros.any()) == ("down_proj" in matrix.name) and (weights[zeros] == 0).all()
        assert not torch.equal(weights, before[matrix.name])
    assert not any("parametrizations" in name for name, _ in student.named_modules())


def test_zeros_stay_zeros_in_bfloat16_under_checkpointing():
    student = pruned(torch.bfloat16)
    before = zeros_of(student)
    report = healed(student, build("llama", dtype=torch.bfloat16), "owlore", checkpointing=True, hidden_weight=0.5)
    assert learnt(report)
    assert all((zeros >= before[name]).all() for name, zeros in zeros_of(student).items())
    assert not student.model.gradient_checkpointing


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_of_zeros_are_zero_when_layers_were_frozen_before_or_in_between(trains):
    student = pruned().requires_grad_(trains)
    held = pruned_matrices(find_decoder_layers(student))
    assert len(held) == 4 * 7
    with kept_at_zero(held) as set_back:
        assert all(p.requires_grad is trains for p in held)
        for flag in (False, True):
            student.requires_grad_(flag)
        student(**batch_for(student)).logits.sum().backward()
        for p in held:
            assert not p.grad[p == 0].any() and p.grad.any()
            p.data += 1
        set_back()
    assert all(float((p == 0).float().mean()) > 0.5 for p in held)
    student.zero_grad()
    student(**batch_for(student)).logits.sum().backward()
    assert held[0].grad[held[0] == 0].any(), "nothing stays attached"


@pytest.mark.parametrize("method", ["full", "lora", "owlore-peft"])
def test_ranks_stay_and_what_is_saved_loads(method, tmp_path):
    student = factorized()
    ranks = {n: m.rank for n, m in student.named_modules() if isinstance(m, LowRankLinear)}
    healed(student, build("llama"), method)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n: m.rank for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)} == ranks != {}
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    torch.testing.assert_close(logits(loaded), logits(student))
    assert loaded.config.use_cache


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sparse_parts_beside_factors_keep_their_zeros(method, tmp_path):
    student = build("llama")
    factorize(student, 0.6, "oats", batches=[batch_for(student)])
    parts = {n: m for n, m in student.named_modules() if isinstance(m, LowRankLinear)}
    before, ranks = {n: m.sparse.weight == 0 for n, m in parts.items()}, {n: m.rank for n, m in parts.items()}
    weights = {n: m.sparse.weight.detach().clone() for n, m in parts.items()}
    assert learnt(healed(student, build("llama"), method))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    after = {n: m for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)}
    assert {n: m.rank for n, m in after.items()} == ranks and len(ranks) == 4 * 7
    assert all((m.sparse.weight[before[n]] == 0).all() for n, m in after.items())
    assert any(not torch.equal(m.sparse.weight, weights[n]) for n, m in after.items()), "what is not zero learns"
    torch.testing.assert_close(logits(loaded), logits(student))


@pytest.mark.process
def test_a_dropped_student_with_hidden_states_reloads_in_a_fresh_process(tmp_path):
    student, teacher = build("llama"), build("llama")
    drop(student, [1])
    report = healed(student, teacher, "full", hidden_weight=1.0, label_weight=0.2, temperature=2.0)
    assert report.layers["teacher_layer"] == [0, 2, 3] and "by nearest weights" in report.notes[0]
    assert learnt(report)
    student.save_pretrained(tmp_path)
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), 'logits.pt')\n"
    )
    done = run_fresh(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = student.eval()(torch.arange(3, 12)[None]).logits.detach()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("method", ["owlore", "full", "lora", "owlore-peft"])
def test_an_interrupted_run_ends_in_the_same_bits(method, tmp_path, monkeypatch):
    def make():
        return factorized() if method == "owlore-peft" else pruned()

    teacher, whole = build("llama"), make()
    often = {"save_every": 2}
    expected = healed(whole, teacher, method, tmp_path / "whole", **often)
    losses, compute = [], DistillationTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if len(losses) == 9:  # in the middle of step 5, behind the checkpoint of step 4
            raise KeyboardInterrupt
        losses.append(0)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", dies)
    broken = make()
    with pytest.raises(KeyboardInterrupt):
        healed(broken, teacher, method, tmp_path / "killed", **often)
    assert not any("lora" in name or "owlore" in name for name in broken.state_dict())
    monkeypatch.undo()
    resumed = make()
    report = healed(resumed, teacher, method, tmp_path / "killed", **often)
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert report.results["curve"] == expected.results["curve"] and report.layers == expected.layers
    with pytest.raises(ValueError, match=r"temperature: expected 1.0, as in the run in .*, got 2.0"):
        healed(make(), teacher, method, tmp_path / "killed", temperature=2.0, **often)
    with pytest.raises(ValueError, match=r"student's weights: expected '.*', as in the run in"):
        healed(resumed, teacher, method, tmp_path / "killed", **often)


def test_ctrl_c_ends_at_once_where_nothing_could_be_kept(ctrl_c, monkeypatch, capsys):
    done, compute = [], DistillationTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        done.append(0)
        signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        healed(build("llama"), build("llama"))
    assert len(done) == 1 and "saves" not in capsys.readouterr().err


def test_no_checkpoints_where_none_could_be_kept(monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", lambda *_: pytest.fail("saved a checkpoint"))
    assert healed(build("llama"), build("llama"), steps=2, save_every=1, log_every=1).results["tokens"] == 2 * 4 * 12


def test_the_objective_against_the_formulas():
    """KL at each token that is no padding, cross entropy of each next token, hidden states of matched layers."""
    student, teacher = build("llama"), build("llama")
    drop(student, [2])
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    batch = batch_for(student, "right")
    mask = batch["attention_mask"].bool()
    mine, theirs = find_decoder_layers(student), find_decoder_layers(teacher)
    objective = Objective(mine, theirs, 2.0, 0.25, 0.5, [0, 1, 3])
    a, b = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    p, q = ((out.logits / 2).log_softmax(-1)[mask] for out in (b, a))
    divergence = 4 * (p.exp() * (p - q)).sum(-1).mean()
    following = batch["input_ids"].masked_fill(~mask, -100)[:, 1:]
    entropy = cross_entropy(a.logits[:, :-1].flatten(0, 1), following.flatten())
    errors = []
    for x, y in ((a.hidden_states[1], b.hidden_states[1]), (a.hidden_states[2], b.hidden_states[2])):
        errors.append(((x - y)[mask].square().sum(-1) / y[mask].square().sum(-1)).mean())
    last = [None, None]
    for i, stack in enumerate((mine, theirs)):  # what transformers gives as the last one stands behind the norm
        hook = stack[-1].register_forward_hook(lambda m, args, out, i=i: last.__setitem__(i, out))
        stack.model(**batch)
        hook.remove()
    errors.append(((last[0] - last[1])[mask].square().sum(-1) / last[1][mask].square().sum(-1)).mean())
    expected = 0.75 * divergence + 0.25 * entropy + 0.5 * torch.stack(errors).mean()
    found = objective(student, batch)
    torch.testing.assert_close(found, expected)
    parameters = list(student.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_texts_and_the_end_of_them_to_measure_on():
    tokenizer = gpt_like()
    student, teacher = (build("llama", vocab_size=len(tokenizer)) for _ in range(2))
    drop(student, 3)
    same = copy.deepcopy(student)
    text = " ".join(["one two three four five six seven eight nine ten a"] * 30)
    report = heal(student, teacher, [text], settings("full"), tokenizer=tokenizer, teacher_tokenizer=gpt_like())
    expected = heal(same, teacher, pack(tokenizer, [text], 12), settings("full"))
    assert report.results["curve"] == expected.results["curve"]
    assert report.results["perplexity"] == expected.results["perplexity"]
    for given in (
        {"texts": [text], "tokenizer": tokenizer},
        {"batches": token_batches(tokenizer, text, sequence_length=12, max_samples=999)},
    ):
        again = build("llama", vocab_size=len(tokenizer))
        drop(again, 3)
        found = heal(again, teacher, settings=settings("full"), **given).results
        assert found["curve"] == expected.results["curve"] and found["perplexity"] == expected.results["perplexity"]
    with pytest.raises(ValueError, match="tokenizer: expected the student's tokenizer for texts, got none"):
        heal(student, teacher, [text], settings("full"))
    with pytest.raises(
        ValueError, match="tokenizer: expected the student's tokenizer with teacher_tokenizer, got none"
    ):
        heal(student, teacher, WINDOWS, settings("full"), teacher_tokenizer=tokenizer)
    with pytest.raises(ValueError, match="text: expected more than the 99 windows of 12 tokens"):
        heal(student, teacher, text, settings("full", eval_samples=99), tokenizer=tokenizer)


def test_pairs_that_do_not_go_together():
    student = build("llama")
    wide = build("llama", hidden_size=64)
    packed = pruned()
    pack_sparse(packed)
    for pair, method, changes, message in [
        ((student, student), "full", {}, "teacher: expected another model than the student, got the same"),
        ((student, build("llama", vocab_size=98)), "full", {}, "the student's vocabulary of 99 tokens, got 98"),
        (
            (student, wide),
            "full",
            {"hidden_weight": 1.0},
            "hidden_weight: expected 0 with a teacher of another width .* 32, .* 64",
        ),
        ((build("llama", layers=5), student), "full", {"hidden_weight": 1.0}, "at most the teacher's 4 layers, got 5"),
        ((student, build("bert")), "full", {}, "teacher: expected a causal language model, got BertForMaskedLM"),
        ((pruned(), student), "owlore-peft", {}, "method: expected owlore, lisa, galore, lora or full for a student"),
        ((packed, student), "lora", {}, "student: .* plain .*heal a model before it is quantized or packed"),
    ]:
        with pytest.raises(ValueError, match=message):
            healed(*pair, method, **changes)
    with pytest.raises(ValueError, match=r"data: expected token ids of shape \(windows, 16\).*\(20, 12\)"):
        healed(student, wide, sequence_length=16)
    with pytest.raises(ValueError, match="with full, which does not sample layers by scores, got 'mine'"):
        heal(student, wide, WINDOWS, settings("full"), scores="mine")
    with pytest.raises(ValueError, match=r"with full, which does not sample layers by scores, got LayerScores$"):
        heal(student, wide, WINDOWS, settings("full"), scores=score_layers(student, method="depth"))
    report = healed(student, wide)
    assert learnt(report), "logits alone can be learnt"


def test_scores_are_given_as_they_are_or_by_their_file(tmp_path):
    teacher = build("llama")
    scores = score_layers(factorized(), method="depth")
    others = replace(scores, values=scores.values[::-1])
    file, how = scores.save(tmp_path / "scores.json"), {"sampling": SAMPLING, "output": tmp_path / "run"}
    found = []
    for given in (scores, file, str(file)):
        student = factorized()
        report = heal(student, teacher, WINDOWS, settings("owlore"), scores=given, sampling=SAMPLING)
        assert report.layers["score"] == scores.values
        found.append(logits(student))
    assert all(torch.equal(found[0], other) for other in found[1:])
    heal(factorized(), teacher, WINDOWS, settings("owlore"), scores=scores, **how)
    with pytest.raises(ValueError, match=r"scores that the run in .* started with, got LayerScores; set another"):
        heal(factorized(), teacher, WINDOWS, settings("owlore"), scores=others, **how)


def test_data_comes_in_one_of_three_forms():
    student, teacher, batch = build("llama"), build("llama"), {"input_ids": WINDOWS}
    padded = {**batch, "attention_mask": torch.ones_like(WINDOWS).tril()}
    for given, message in [
        ({}, "data: expected windows, batches, or tokenizer and texts, got none of them"),
        ({"data": WINDOWS, "texts": "one"}, "data: expected windows, batches, or .*, got data and texts"),
        ({"batches": [batch], "texts": "one"}, "data: expected windows, batches, or .*, got batches and texts"),
        ({"batches": []}, "batches: expected at least one, got none"),
        ({"batches": [{"pixel_values": WINDOWS}]}, "batches: expected input_ids without labels, got pixel_values in"),
        ({"batches": [{**batch, "labels": WINDOWS}]}, "batches: expected input_ids without labels, got input_ids, lab"),
        ({"batches": [batch, padded]}, "batches: expected samples of one length without padding, .* in batch 1; tok"),
        ({"batches": [batch, {"input_ids": WINDOWS[:, 1:]}]}, "batches: expected samples of one length .* in batch 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            heal(student, teacher, settings=settings("full"), **given)


@pytest.mark.parametrize("counted, told", [("n_gpu", "2 GPUs"), ("world_size", "2 processes")])
def test_steps_of_more_samples_than_were_asked_for_are_refused(counted, told, monkeypatch):
    monkeypatch.setattr(TrainingArguments, counted, 2)
    student = build("llama")
    with pytest.raises(ValueError, match=f"device: expected one process and one GPU, .*, got {told}; "):
        healed(student, build("llama"))
    assert student.config.use_cache, "Trainer turns it off"


@pytest.mark.parametrize(
    "windows, message",
    [
        (WINDOWS[:0], r"expected token ids .* at least one window, got torch.int64 \(0, 12\)"),
        (WINDOWS[0], r"expected token ids of shape \(windows, 12\), .* got torch.int64 \(12,\)"),
        (WINDOWS[:, :8], r"expected token ids of shape \(windows, 12\), .* got torch.int64 \(20, 8\)"),
        (WINDOWS.float(), r"expected token ids .* got torch.float32 \(20, 12\)"),
        (WINDOWS + 99, "expected the student's token ids, 0 to 98, got 1.. to 1.."),
        (-WINDOWS, "expected the student's token ids, 0 to 98, got -"),
    ],
)
def test_windows_that_are_none_of_the_students(windows, message, tmp_path):
    pair = build("llama"), build("llama")
    for field, data, held_out in [("data", windows, WINDOWS), ("held_out", WINDOWS, windows)]:
        with pytest.raises(ValueError, match=f"{field}: {message}"):
            heal(*pair, data, settings("full"), held_out=held_out, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_told():
    check_tokenizers(gpt_like(), gpt_like())
    with pytest.raises(
        ValueError, match=r"with 13 tokens, '.*' as 1, got another with 16 tokens, '.*' missing; use the model"
    ):
        check_tokenizers(gpt_like(), bert_like())
    other = gpt_like()
    from tokenizers import pre_tokenizers

    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("x", "isolated")  # the same vocabulary
    with pytest.raises(ValueError, match=r"which splits a probe text into \d+ tokens with .* got \d+ with"):
        check_tokenizers(gpt_like(), other)


def test_settings_and_shares():
    assert HealSettings(tokens="2M").total_steps == -(-2_000_000 // (16 * 256))
    changed = replace(HealSettings(tokens="2M"), batch_size=8)
    assert changed.total_steps == changed.resolved()["steps"] == -(-2_000_000 // (8 * 256))
    assert HealSettings().total_steps == 300 and HealSettings(steps=7).total_steps == 7
    assert [count_tokens(told) for told in ("1.5m", "500k", "12")] == [1_500_000, 500_000, 12]
    for values, message in [
        ({"tokens": "many"}, "tokens: expected a number such as 2M or 500k, got 'many'"),
        ({"tokens": "2M", "steps": 7}, "tokens: expected none with steps, got '2M' and 7"),
        ({"tokens": "2M", "steps": 300}, "tokens: expected none with steps, got '2M' and 300"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"label_weight": 2.0}, r"label_weight: expected a share in 0..1, got 2.0"),
        ({"hidden_weight": -1.0}, "hidden_weight: expected a weight of at least 0, got -1.0"),
        ({"teacher_layers": [0]}, "teacher_layers: expected hidden_weight above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            HealSettings(**values)
    assert recovered_share(10.0, 40.0, 20.0) == pytest.approx(0.5)
    assert recovered_share(10.0, 9.0, 8.0) is None and recovered_share(10.0, float("inf"), 20.0) is None
