"""OwLoreAdamW against the papers' definitions, and through Trainer, accelerate and TRL."""

import copy
import random
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_cod import LayerScores, OwLoreAdamW, allocate, find_decoder_layers, owlore, score_layers
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import set_up
from tests.tiny_models import MIXTURE_TYPES, batch_for, build, build_mixture, unmapped_outputs
from tests.tiny_training import rows, run_in_two_processes
from tests.training.owlore.references import adamw, galore


def train(model, optimizer, steps, first=0):
    """The weights after each step, each on other tokens."""
    found = []
    for step in range(first, first + steps):
        ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


def gradients(model, step):
    """All gradients of a step, by the whole model."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(step))
    whole = copy.deepcopy(model).requires_grad_(True)
    for p in whole.parameters():
        p.grad = None
    whole(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else None


def test_uniform_scores_and_full_rank_are_lisa():
    """AdamW from scratch on the drawn layers; the others do not move."""
    model = build("llama").double()
    optimizer = OwLoreAdamW(
        model, lr=1e-2, weight_decay=0.1, n_active=2, interval=3, rank=None, floor=1.0, train_embeddings=True
    )
    assert optimizer.sampler.probabilities == [0.25] * 4
    states, seen = {}, set()
    for step in range(9):
        active, before = set(optimizer.active), {n: p.detach().clone() for n, p in model.named_parameters()}
        seen.add(tuple(active))
        assert active == set(optimizer.sampler.draw(step // 3))
        if step % 3 == 0:
            left = {name for name in states if layer_of(name) is not None and layer_of(name) not in active}
            states = {name: state for name, state in states.items() if name not in left}
        grads = gradients(model, step)
        after = train(model, optimizer, 1, step)[0]
        for name, w in before.items():
            if layer_of(name) is None or layer_of(name) in active:
                expected = adamw(w, grads[name], states.setdefault(name, {}), 1e-2, decay=0.1)
                torch.testing.assert_close(after[name], expected, atol=1e-9, rtol=1e-6, msg=name)
            else:
                assert torch.equal(after[name], w), name
    assert len(seen) > 1


def test_all_layers_active_is_galore(monkeypatch):
    """With the basis of a full SVD in the place of ours, which spans nearly the same."""

    def exact(G, r, generator):
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return Vh[:r].T if G.shape[0] >= G.shape[1] else U[:, :r]

    monkeypatch.setattr("hf_cod.training.owlore.moments.gradient_basis", exact)
    model = build("llama").double()
    optimizer = OwLoreAdamW(model, lr=1e-2, weight_decay=0.1, n_active=4, interval=3, rank=8, scale=0.25)
    states = {}
    for step in range(7):
        before, grads = {n: p.detach().clone() for n, p in model.named_parameters()}, gradients(model, step)
        after = train(model, optimizer, 1, step)[0]
        for name, w in before.items():
            state = states.setdefault(name, {})
            if layer_of(name) is None:
                expected = adamw(w, grads[name], state, 1e-2, decay=0.1) if "model.norm" in name else w
            elif w.ndim == 2:
                expected = galore(w, grads[name], state, 1e-2, 8, step % 3 == 0, 0.25, decay=0.1)
            else:
                expected = adamw(w, grads[name], state, 1e-2, decay=0.1)
            torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1e-5, msg=name)


def scored(model):
    return score_layers(model, batches=[batch_for(model)], threshold=2.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "opt", "bert"])
def test_learns_and_leaves_the_rest_alone(family):
    model = build(family)
    optimizer = OwLoreAdamW(model, scored(model), lr=1e-2, n_active=1, interval=100, rank=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = batch_for(model)
    batch["labels"] = batch["input_ids"]
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    active = optimizer.layers.stack.layers_path + f".{optimizer.active[0]}."
    norm = {id(p) for p in optimizer.layers.always}
    for name, p in model.named_parameters():
        if id(p) in norm:
            continue
        if active not in name:
            assert torch.equal(p, before[name]) and not p.requires_grad, name
    moved = [name for name, p in model.named_parameters() if active in name and not torch.equal(p, before[name])]
    assert moved


@pytest.mark.parametrize("checkpointing", ["never", "before", "after"])
def test_the_backward_pass_ends_at_the_lowest_active_layer(checkpointing):
    """With activation checkpointing too, whether it is turned on before or after the optimizer is made."""
    model = build("llama", layers=6).train()
    if checkpointing == "before":
        model.activation_checkpointing_enable()
    optimizer = OwLoreAdamW(model, n_active=1, rank=None, seed=1)
    lowest = optimizer.active[0]
    assert lowest > 0
    if checkpointing == "after":
        model.activation_checkpointing_enable()
        train(model, optimizer, 1)
    reached = []
    for index, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    ids = batch_for(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert set(reached) == set(range(lowest, 6))
    for index, layer in enumerate(model.model.layers):
        assert all((p.grad is not None) == (index == lowest) for p in layer.parameters())


def test_an_expert_gets_its_basis_from_its_first_token():
    """Two experts of four are idle in the first step of an interval; one of them then gets a gradient of rank 1."""
    model = build("mixtral")
    optimizer = OwLoreAdamW(model, n_active=4, interval=4, rank=4, lr=1e-2)
    bank = model.model.layers[1].mlp.experts.down_proj
    random = torch.Generator().manual_seed(1)
    for busy in ((0, 1), (0, 1), (0, 1, 2), (0, 1, 2), (2,), (0, 1, 2)):  # the second draw begins with the fifth
        before, late = bank.detach().clone(), torch.outer(*(torch.randn(n, generator=random) for n in bank.shape[1:]))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random) if p.requires_grad else None
        bank.grad[[e for e in range(4) if e not in busy]] = 0
        if 2 in busy:
            bank.grad[2] = late
        first = 2 in busy and optimizer.steps == 2
        optimizer.step()
        moved = bank.detach() - before
        assert torch.equal(moved[3], torch.zeros_like(moved[3]))
        assert all(moved[e].abs().max() > 0 for e in busy)
        if first:  # it lies in the direction of the gradient, not in that of coordinate axes
            P = optimizer.state[bank]["basis"][2]
            assert torch.linalg.norm(late @ P if late.shape[0] >= late.shape[1] else P.T @ late) == pytest.approx(
                float(torch.linalg.norm(late)), rel=1e-4
            )
    assert optimizer.state[bank]["draw"].tolist() == [1, 1, 1, -2]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_each_expert_is_trained_in_its_own_basis(kind):
    """GaLore of one expert's gradients is what its part of the bank does; biases of experts are in full rank, since a
    basis of (experts, out) holds only the experts that had tokens.
    """
    model = build_mixture(kind).double()
    how = {"n_active": 4, "interval": 3, "rank": 2, "scale": 0.25}
    optimizer = OwLoreAdamW(model, lr=1e-2, **how)
    banks = [m for i in range(4) for m in optimizer.layers.stack.expert_matrices(i)]
    states = {}
    random = torch.Generator().manual_seed(1)
    for step in range(3):
        before = {m.name: m.parameter.detach().clone() for m in banks}
        biases = {m.name: m.bias.detach().clone() for m in banks if m.bias is not None}
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)
        for m in banks:  # of rank 2, so that the basis is exact; the last expert never has a token
            left, right = m.parameter.grad[..., :2], m.parameter.grad[:, :2]
            m.parameter.grad = left @ right
            m.parameter.grad[-1] = 0
            if m.bias is not None:
                m.bias.grad[:2] *= step > 0
                m.bias.grad[-1] = 0
        grads = {m.name: m.parameter.grad.clone() for m in banks}
        of_biases = {m.name: m.bias.grad.clone() for m in banks if m.bias is not None}
        optimizer.step()
        for m in banks:
            state = states.setdefault((m.name, "one"), {})
            expected = galore(before[m.name][1], grads[m.name][1], state, 1e-2, 2, step == 0, 0.25)
            torch.testing.assert_close(m.parameter[1].detach(), expected, atol=1e-6, rtol=1e-4, msg=m.name)
            assert torch.equal(m.parameter[-1], before[m.name][-1]) and m.parameter.isfinite().all()
            if m.bias is not None:
                expected = adamw(biases[m.name], of_biases[m.name], states.setdefault((m.name, "bias"), {}), 1e-2)
                torch.testing.assert_close(m.bias.detach(), expected, atol=1e-9, rtol=1e-7, msg=m.name)
                assert torch.equal(m.bias[-1], biases[m.name][-1])
        optimizer.zero_grad()


FAST = ("mixtral", "gpt_oss", "llama4_text")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]


@pytest.mark.parametrize("method", ["owlore", "lisa", "galore"])
@pytest.mark.parametrize("kind", KINDS)
def test_banks_of_all_families_train(kind, method, tmp_path):
    """Those of the active layers and no others; a reload computes the same bit by bit."""
    model = build_mixture(kind).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = OwLoreSettings(n_active=4 if method == "galore" else 2, rank=None if method == "lisa" else 2)
    _, optimizer = set_up(method, model, None, how, 1e-2, 2)
    losses = train_on(model, optimizer, 4)
    assert losses[-1] < losses[0]
    stack = find_decoder_layers(model)
    for index in range(4):
        for matrix in stack.expert_matrices(index):
            moved = not torch.equal(matrix.parameter, before[matrix.name])
            assert moved == (index in optimizer.active), matrix.name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(unmapped_outputs(again), unmapped_outputs(model))


def train_on(model, optimizer, steps):
    """Losses of steps on the same tokens."""
    ids, losses = batch_for(model)["input_ids"], []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("deselected", ["drop", "keep", "offload"])
def test_state_of_layers_that_are_left(deselected):
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=1, interval=2, rank=4, deselected=deselected, floor=1.0)
    visited = set()
    for step in range(12):
        visited.add(optimizer.active[0])
        train(model, optimizer, 1, step)
    held = {group["layer"] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state}
    now = optimizer.active if optimizer.steps % 2 else []
    assert held - {None} == (visited if deselected != "drop" else held - {None} & set(now)) and len(visited) > 1


def test_moments_are_small_and_float32_under_bfloat16_weights():
    model = build("llama", dtype=torch.bfloat16)
    optimizer = OwLoreAdamW(model, n_active=1, interval=10, rank=4)
    train(model, optimizer, 2)
    for p, state in optimizer.state.items():
        assert state["exp_avg"].dtype == torch.float32
        if p.ndim == 2:
            assert state["exp_avg"].shape in {(p.shape[0], 4), (4, p.shape[1])}
            assert state["basis"].shape == (min(p.shape), 4)
            assert state["basis"].untyped_storage().nbytes() == state["basis"].numel() * 4


def test_moments_of_eight_bits_lead_nearly_as_far_in_a_quarter_of_the_memory():
    """Against float32 moments, from equal weights; what is resumed from codes goes on bit for bit."""
    moved, sizes, runs = {}, {}, {}
    for moments in ("float32", "8bit"):
        model = build("llama", hidden_size=64, intermediate_size=128)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = OwLoreAdamW(model, n_active=4, interval=99, rank=None, lr=1e-3, moments=moments)
        after = train(model, optimizer, 10)[-1]
        moved[moments] = torch.cat([(after[name] - w).flatten() for name, w in before.items()])
        state = optimizer.state[model.model.layers[0].mlp.up_proj.weight]
        sizes[moments] = sum(t.nbytes for key, t in state.items() if key.startswith("exp_avg"))
        runs[moments] = model, optimizer
    difference = (moved["8bit"] - moved["float32"]).norm() / moved["float32"].norm()
    assert 0 < difference < 0.05
    assert sizes["8bit"] / sizes["float32"] == pytest.approx(0.25 + 1 / 256, rel=0.01)
    model, optimizer = runs["8bit"]
    twin = copy.deepcopy(model)
    other = OwLoreAdamW(twin, n_active=4, interval=99, rank=None, lr=1e-3, moments="8bit")
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(train(model, optimizer, 3, 10), train(twin, other, 3, 10), strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_eight_bits_with_bases_that_change_and_state_that_is_kept():
    model = build("llama", hidden_size=128, intermediate_size=256)
    optimizer = OwLoreAdamW(model, n_active=1, interval=2, rank=32, lr=1e-3, moments="8bit", deselected="offload")
    train(model, optimizer, 12)
    coded = [state for state in optimizer.state.values() if "exp_avg_scale" in state]
    assert coded and all(state["exp_avg"].dtype == torch.uint8 for state in coded)
    assert all(p.isfinite().all() for p in model.parameters())


def test_small_updates_reach_bfloat16_weights_by_stochastic_rounding():
    """Updates of 1/2000 of a weight: to nearest they are all lost."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = build("llama", dtype=torch.bfloat16)
        for p in model.parameters():
            p.data.fill_(1.0)
        optimizer = OwLoreAdamW(model, lr=5e-4, n_active=4, interval=99, rank=None, rounding=rounding)
        for _ in range(40):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
        moved[rounding] = float((1 - model.model.layers[0].mlp.up_proj.weight.float()).mean())
    assert moved["nearest"] == 0 and moved["stochastic"] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "dtype, accumulation",
    [
        (torch.float32, 1),
        (torch.bfloat16, 4),
        *[pytest.param(*each, marks=pytest.mark.slow) for each in ((torch.float32, 4), (torch.bfloat16, 1))],
    ],
)
@pytest.mark.parametrize("deselected", ["drop", "keep"])
def test_trainer_resumes_bit_for_bit(dtype, accumulation, deselected, tmp_path):
    """Killed at a random step, in the middle of an interval or not."""

    def trainer(folder, steps):
        model = build("llama", dtype=dtype, attention_dropout=0.1)
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.5,
            lr_scheduler_type="constant",
            save_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        how = owlore(scored(build("llama")), lr=1e-2, n_active=2, interval=3, rank=4, deselected=deselected)
        return Trainer(
            model, arguments, train_dataset=rows(), data_collator=default_data_collator, optimizer_cls_and_kwargs=how
        )

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    stop = random.randint(1, 7)  # a random step, on purpose: any must do
    trainer(tmp_path / "killed", stop).train()
    resumed = trainer(tmp_path / "killed", 8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.optimizer.optimizer.steps == 8
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), (name, stop)


def test_state_dict_holds_tensors_and_numbers_alone(tmp_path):
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=2, interval=2, rank=4)
    train(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    twin = build("llama")
    twin.load_state_dict(model.state_dict())
    other = OwLoreAdamW(twin, n_active=2, interval=2, rank=4)
    other.load_state_dict(loaded)
    other.load_state_dict(other.state_dict())  # as accelerate does
    assert other.active == optimizer.active and other.steps == 3
    for a, b in zip(train(model, optimizer, 3, 3), train(twin, other, 3, 3), strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_fused_gives_the_same_weights_and_keeps_no_gradient():
    plain, fused = build("llama"), build("llama")
    settings = {"n_active": 2, "interval": 2, "rank": 4, "lr": 1e-2}
    optimizers = OwLoreAdamW(plain, **settings), OwLoreAdamW(fused, fused=True, **settings)
    for a, b in zip(train(plain, optimizers[0], 5), train(fused, optimizers[1], 5), strict=True):
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
    ids = batch_for(fused)["input_ids"]
    fused(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in fused.parameters())
    with pytest.raises(ValueError, match="fused: expected one backward pass per step, got more"):
        fused(input_ids=ids, labels=ids).loss.backward()


def test_fused_ends_with_its_optimizer():
    """Not a hook is left, by release or when nobody has the optimizer any more."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    for end in ("release", "delete", "another"):
        model = build("llama")
        optimizer = OwLoreAdamW(model, n_active=2, rank=4, lr=1e-2, fused=True)
        if end == "release":
            optimizer.release()
        if end == "another":
            other = OwLoreAdamW(model, n_active=2, rank=4, lr=1e-2)
        if end == "delete":
            del optimizer
        before = [p.detach().clone() for p in model.parameters()]
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), end
        assert any(p.grad is not None for p in model.parameters())
    other.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_fused_under_loss_scaling_is_refused(monkeypatch):
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=2, rank=4, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    ids = batch_for(model)["input_ids"]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="fused: expected no loss scaling, got a GradScaler; train in bfloat16"):
        scaler.step(optimizer)
    monkeypatch.setattr("hf_cod.training.owlore.update_in_backward.is_initialized", lambda: True)
    monkeypatch.setattr(
        "hf_cod.training.owlore.update_in_backward.AcceleratorState", lambda: SimpleNamespace(mixed_precision="fp16")
    )
    with pytest.raises(ValueError, match="fused: expected no loss scaling"):
        OwLoreAdamW(model, n_active=2, rank=4, fused=True)


@pytest.mark.process
def test_shards_are_refused(tmp_path, monkeypatch):
    """FSDP 1 and 2, before and after the optimizer is made; DeepSpeed's flat partitions."""
    run_in_two_processes("owlore_shards", tmp_path)
    for rank in range(2):
        assert torch.load(tmp_path / f"shards-{rank}.pt") == ["fsdp1", "fsdp1 after", "fsdp2", "fsdp2 after"]
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=2, rank=4)
    for group in optimizer.param_groups:  # as stages 1 and 2 of DeepSpeed do
        group["params"] = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(ValueError, match="model: expected unsharded parameters, got sharded ones"):
        optimizer.step()
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("hf_cod.training.owlore.active_layers.is_initialized", lambda: True)
    monkeypatch.setattr("hf_cod.training.owlore.active_layers.AcceleratorState", lambda: state)
    with pytest.raises(ValueError, match="model: expected unsharded parameters, got sharded ones"):
        OwLoreAdamW(build("llama"), n_active=2, rank=4)


@pytest.mark.process
def test_two_processes_stay_in_step_and_train_as_one(tmp_path):
    run_in_two_processes("owlore", tmp_path)
    first, second = (torch.load(tmp_path / f"owlore-{rank}.pt") for rank in range(2))
    assert first["active"] == second["active"] and len(set(map(tuple, first["active"]))) > 1
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, first["alone"][name], atol=1e-5, rtol=1e-4, msg=name)


def test_with_sfttrainer(tmp_path):
    import datasets
    import trl

    from tests.tiny_tokenizers import WORDS, gpt_like

    tokenizer = gpt_like()
    data = datasets.Dataset.from_dict({"text": [" ".join(WORDS)] * 16})
    model = build("llama", vocab_size=len(tokenizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", bf16=False, disable_tqdm=True
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=owlore(n_active=1, interval=50, rank=4, lr=1e-2),
    )
    trainer.train()
    moved = {layer_of(name) for name, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[name])}
    active = trainer.optimizer.optimizer.active if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.active
    assert moved == {active[0], None}


@pytest.mark.parametrize("rank", [None, 4])
def test_an_overflow_under_loss_scaling_changes_nothing(rank):
    """The first scale is too large by far; in the end the losses fall."""
    model = build("llama")
    ids = batch_for(model)["input_ids"]
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=99, rank=rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    losses, overflows = [], 0
    for _ in range(130):
        before, steps = [p.detach().clone() for p in model.parameters()], optimizer.steps
        loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss * 1e4).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if optimizer.steps == steps:
            overflows += 1
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert not optimizer.state
        if optimizer.steps == 6:
            break
    assert optimizer.steps == 6 and overflows and losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("settings", [{"deselected": "offload"}, {"moments": "8bit"}])
def test_resumed_with_state_that_is_offloaded_or_coded(settings, tmp_path):
    """In the middle of an interval, from a file, into another process's twin of the model."""
    model = build("llama", hidden_size=128, intermediate_size=256)
    settings = {"n_active": 2, "interval": 2, "rank": 32, "lr": 1e-2, "deselected": "keep", "floor": 1.0, **settings}
    optimizer = OwLoreAdamW(model, **settings)
    train(model, optimizer, 5)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(model)
    other = OwLoreAdamW(twin, **settings)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert other.active == optimizer.active and len(optimizer.state) > 20
    for a, b in zip(train(model, optimizer, 5, 5), train(twin, other, 5, 5), strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_model_that_is_converted_once_the_optimizer_exists():
    model = build("llama")
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=3, rank=4)
    train(model, optimizer, 2)
    model.to(torch.bfloat16)
    ids, losses = batch_for(model)["input_ids"], []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 4])
def test_weights_of_every_dtype_learn_with_moments_of_at_least_float32(dtype, rank):
    model = build("llama", dtype=dtype)
    ids = batch_for(model)["input_ids"]
    optimizer = OwLoreAdamW(model, n_active=4, interval=99, rank=rank, lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    wide = torch.promote_types(dtype, torch.float32)
    assert all(state["exp_avg"].dtype == wide for state in optimizer.state.values())
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_compiled_model_trains_as_one_that_is_not_through_more_draws_than_compile_keeps():
    """Each set of active layers is compiled anew, until torch has enough and runs it as it stands."""
    plain = build("llama")
    twin = copy.deepcopy(plain)
    settings = {"n_active": 2, "interval": 1, "rank": 4, "lr": 1e-2, "floor": 1.0}
    optimizer, other = OwLoreAdamW(plain, **settings), OwLoreAdamW(twin, **settings)
    compiled = torch.compile(twin, backend="aot_eager")
    draws = {tuple(other.sampler.draw(number)) for number in range(12)}
    assert len(draws) > 3
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            for a, b in zip(train(plain, optimizer, 12), train(compiled, other, 12), strict=True):
                for name, value in a.items():
                    torch.testing.assert_close(b[f"_orig_mod.{name}"], value, atol=1e-5, rtol=1e-4, msg=name)
    finally:
        torch._dynamo.reset()  # torch has given up this family's forward for good, in each later test as well


def test_bad_gradients_change_nothing_and_end_the_training_at_last(caplog):
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=2, rank=4)
    before = [p.detach().clone() for p in model.parameters()]

    def spoiled():
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan")) if p.requires_grad else None

    for _ in range(9):
        spoiled()
        optimizer.step()
    assert "gradients are not finite" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    spoiled()
    with pytest.raises(ValueError, match="NaN or infinity in 10 consecutive steps"):
        optimizer.step()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_active": 5}, "n_active: expected between 1 and the model's 4 layers, got 5"),
        ({"n_active": 0}, "n_active: expected at least 1, got 0"),
        ({"n_active": 1, "rank": 64}, "rank: expected at most 32, the width of the layers' matrices, got 64"),
        ({"n_active": 1, "interval": 0}, "interval: expected at least 1, got 0"),
        (
            {"n_active": 1, "rank": 4, "deselected": "lose"},
            "deselected: expected one of drop, keep, offload, got 'lose'",
        ),
        (
            {"n_active": 1, "rank": 4, "moments": "4bit"},
            "moments: did you mean 8bit\\? expected .*, got '4bit'",
        ),
        ({"n_active": 1, "rank": 4, "scale": 0.0}, "scale: expected a finite number above 0, got 0.0"),
        ({"n_active": 1, "rank": 4, "scale": float("nan")}, "scale: expected a finite number above 0, got nan"),
        ({"n_active": 1, "rank": 4, "lr": -1.0}, "lr: expected at least 0, got -1.0"),
        ({"n_active": 1, "rank": 4, "eps": float("inf")}, "eps: expected a finite number of at least 0, got inf"),
        ({"n_active": 1, "rank": 4, "lr": float("nan")}, "lr: expected a finite number of at least 0, got nan"),
        ({"n_active": 1, "rank": 4, "betas": (0.9, 1.0)}, "betas: expected two numbers in"),
        (
            {"n_active": 1, "rank": 4, "scores": LayerScores("other", "owl", [1.0] * 4, [7] * 4)},
            "scores: expected those of a model with .* weights in layer 0, got one with 7 .other.",
        ),
    ],
)
def test_bad_input(arguments, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        OwLoreAdamW(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("part", ["", "model.layers.2.mlp.up_proj"])
def test_weights_on_the_meta_device_are_refused(part):
    model = build("llama")
    model.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=f"^model: expected weights.*, got .* on the meta device.*{part}"):
        OwLoreAdamW(model, n_active=1, rank=4)
    assert all(p.requires_grad for p in model.parameters())


def test_defaults_are_lowered_to_what_the_model_has(caplog, tmp_path):
    """With a note, and to plain numbers, which a checkpoint can hold; the same numbers, given, are refused above."""
    model = build("llama")
    factory, arguments = owlore(None, **asdict(OwLoreSettings()))
    for make in (lambda: OwLoreAdamW(model), lambda: factory()(model, **arguments)):
        made = make()
        assert (made.settings.n_active, made.settings.rank) == (4, 32) and made.active == [0, 1, 2, 3]
        assert type(made.settings.n_active) is type(made.settings.rank) is int
        assert "n_active: 4 instead of the default 5: as many layers can train" in caplog.text
        assert "rank: 32 instead of the default 128: the width of the layers' matrices" in caplog.text
        caplog.clear()
    torch.save(made.state_dict(), tmp_path / "optimizer.pt")
    made.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for given, message in (({"n_active": 5}, "n_active: expected between"), ({"rank": 128}, "rank: expected at most")):
        with pytest.raises(ValueError, match=message):
            OwLoreAdamW(model, **given)
    caplog.clear()
    assert OwLoreAdamW(model, n_active=2, rank=8).settings.rank == 8 and "instead" not in caplog.text


def test_only_layers_that_can_train_are_drawn():
    model = build("llama")
    model.model.layers[:2].requires_grad_(False)
    optimizer = OwLoreAdamW(model, scored(build("llama")), n_active=1, interval=1, rank=4)
    seen = set()
    for step in range(8):
        seen.update(optimizer.active)
        train(model, optimizer, 1, step)
    assert seen == {2, 3}
    with pytest.raises(ValueError, match="n_active: expected between 1 and the 2 trainable layers, got 3"):
        OwLoreAdamW(model, n_active=3, rank=4)


def test_what_never_trains_is_told(caplog):
    model = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4))
    OwLoreAdamW(model, n_active=1, rank=4)
    assert re.search(r"model: 3\d % of its weights never train: encoder.block.\*.layer", caplog.text)
    caplog.clear()
    model = build("llama")
    model.model.layers[0].requires_grad_(False)  # meant
    OwLoreAdamW(model, n_active=1, rank=4)
    assert "never train" not in caplog.text


def test_a_parameter_without_elements_is_no_error():
    model = build("llama")
    model.model.norm.register_parameter("empty", torch.nn.Parameter(torch.empty(1, 0, 8)))  # as DINOv3's registers
    model.model.norm.register_forward_hook(lambda norm, args, out: out + norm.empty.sum())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (after,) = train(model, OwLoreAdamW(model, lr=1e-2, n_active=1), 1)
    assert model.model.norm.empty.grad is None or not model.model.norm.empty.grad.numel()
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_layers_are_drawn_by_an_allocation_of_probability():
    model = build("llama")
    plan = allocate(scored(model), "probability", budget=0.5, layer_parameters=[1] * 4)
    optimizer = OwLoreAdamW(model, plan, n_active=2, interval=1, rank=4)
    assert optimizer.sampler.probabilities == plan.values
    train(model, optimizer, 2)
    with pytest.raises(
        ValueError, match="scores: expected scores, or an allocation of probability, got one of sparsity"
    ):
        OwLoreAdamW(model, allocate(scored(model), "sparsity", budget=0.5), n_active=2, rank=4)


def test_bad_states():
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=2, rank=4)
    with pytest.raises(ValueError, match="state_dict: expected one of OwLoreAdamW"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="rank: expected 4 as in the checkpoint, got 8"):
        OwLoreAdamW(build("llama"), n_active=2, rank=8).load_state_dict(optimizer.state_dict())
    wider = OwLoreAdamW(build("llama", hidden_size=64), n_active=2, rank=4)
    with pytest.raises(ValueError, match=r"model: expected a parameter of \[32, 32\] as in the checkpoint, got one of"):
        wider.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="gradients: expected gradients of active layers, got none"):
        optimizer.step()
    with pytest.raises(ValueError, match="model: expected trainable layers, got frozen"):
        OwLoreAdamW(build("llama").requires_grad_(False), n_active=1, rank=4)


@pytest.mark.parametrize("method", ["owlore", "lora", "owlore-peft"])
def test_the_head_of_a_task_trains(method):
    """It may be new: random weights that nobody had trained."""
    model = AutoModelForSequenceClassification.from_config(build("llama").config)
    before = model.score.weight.detach().clone()
    settings = OwLoreSettings(n_active=1, rank=4)
    trained, optimizer = set_up(method, model, None, settings, 1e-2, 4)
    batch = batch_for(model)
    trained(**batch, labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    whole = trained if method == "owlore" else trained.merge_and_unload()
    assert not torch.equal(whole.score.weight, before)
