"""OwLore adapters, and LoRA's a few layers at a time, under Trainer, TRL, accelerate and DDP."""

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_cod import LayerScores, OwLoreAdamW, OwLoreConfig, allocate, lora_ranks, owlore, score_layers
from hf_cod.training.owlore.increment import Increment
from tests.tiny_models import batch_for, build
from tests.tiny_training import rows, run_in_two_processes
from tests.training.adapters.test_adapters import IDS, adapted, logits, train


def layer_of(name):
    return int(name.split(".layers.")[1].split(".")[0])


@pytest.mark.parametrize(
    "dtype, accumulation",
    [
        (torch.float32, 1),
        (torch.bfloat16, 4),
        *[pytest.param(*each, marks=pytest.mark.slow) for each in ((torch.float32, 4), (torch.bfloat16, 1))],
    ],
)
def test_trainer_resumes_bit_for_bit(dtype, accumulation, tmp_path):
    """Killed at a random step, in the middle of an interval or not."""

    def trainer(folder, steps):
        model = get_peft_model(build("llama", dtype=dtype, attention_dropout=0.1), OwLoreConfig(r=4, max_rank=6))
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
        scores = score_layers(build("llama"), batches=[batch_for(build("llama"))], threshold=2.0)
        how = owlore(scores, lr=1e-2, n_active=2, interval=3)
        return Trainer(
            model, arguments, train_dataset=rows(), data_collator=default_data_collator, optimizer_cls_and_kwargs=how
        )

    whole = trainer(tmp_path / "whole", 11)
    whole.train()
    stop = random.randint(1, 10)  # a random step, on purpose: any must do
    trainer(tmp_path / "killed", stop).train()
    resumed = trainer(tmp_path / "killed", 11)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.optimizer.optimizer.steps == 11
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert found.keys() == expected.keys() and any(value.numel() for key, value in found.items() if key.endswith("A"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), (name, stop)


def test_resumed_with_other_settings_is_refused(tmp_path):
    model = adapted()
    optimizer = OwLoreAdamW(model, n_active=2, interval=2)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    for config, settings, message in (
        ({"r": 8}, {}, "r: expected 4 as in the checkpoint, got 8"),
        ({"r": 4, "max_rank": 5}, {}, "max_rank: expected 8 as in the checkpoint, got 5"),
        ({"r": 4}, {"interval": 3}, "interval: expected 2 as in the checkpoint, got 3"),
    ):
        other = OwLoreAdamW(adapted(**config), **{"n_active": 2, "interval": 2, **settings})
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(optimizer.state_dict())
    weights = load_peft_weights(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"r: expected 4 as in the saved adapter, got 8 \(base_model"):
        set_peft_model_state_dict(adapted(r=8), weights)
    wider = get_peft_model(build("llama", intermediate_size=64), OwLoreConfig(r=4))
    with pytest.raises(ValueError, match="adapter: expected one of a matrix with 64 outputs and 32 inputs, got N of"):
        set_peft_model_state_dict(wider, weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_weights(use_reentrant):
    """The backward pass ends at the lowest layer that trains, where checkpoints are not reentrant."""
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(build("llama", layers=6).train(), OwLoreConfig(r=4))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        optimizer = OwLoreAdamW(model, lr=1e-2, n_active=1, interval=3, seed=1)
        lowest = optimizer.active[0]
        assert lowest > 0
        losses = train(model, optimizer, 5)
        found.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, atol=1e-5, rtol=1e-3, msg=name)
    if not use_reentrant:
        reached, lowest = [], optimizer.active[0]
        for index, layer in enumerate(model.base_model.model.model.layers):
            layer.register_full_backward_hook(lambda *_, index=index: reached.append(index))
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert set(reached) == set(range(lowest, 6))


def test_weights_that_are_loaded_once_the_optimizer_exists(tmp_path):
    """The search for a basis goes on where they have none."""
    adapted().save_pretrained(tmp_path)
    model = adapted()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2)
    set_peft_model_state_dict(model, load_peft_weights(tmp_path, device="cpu"))
    train(model, optimizer, 5)
    moved = {
        layer_of(name) for name, m in model.named_modules() if isinstance(m, Increment) and float(m.dense().norm())
    }
    assert moved >= set(optimizer.active)


def test_a_gradient_of_zero_gives_no_basis():
    """The labels of the first step are all ignored by the loss."""
    model = adapted()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=50)
    (model(input_ids=IDS, labels=IDS).loss * 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not any(m.has_basis for m in model.modules() if isinstance(m, Increment))
    losses = train(model, optimizer, 3, 0)
    assert all(m.has_basis for m in model.modules() if isinstance(m, Increment)) and losses


def test_gradients_are_small_from_the_first_step_on():
    model = adapted()
    optimizer = OwLoreAdamW(model, n_active=2, interval=50)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {layer_of(name) for name in grads} == set(optimizer.active)
        assert all(min(grad.shape) == 4 for grad in grads.values())
        optimizer.step()
        optimizer.zero_grad()


def test_loss_scaling_and_autocast():
    """An overflow in the step that looks for a basis changes nothing; the search goes on."""
    model = adapted()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=50)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    losses = []
    for _ in range(130):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        scaler.scale(loss * 1e4).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if optimizer.steps == 10:
            break
    assert optimizer.steps == 10 < len(losses) and losses[-1] < losses[0] - 0.05


@pytest.mark.process
def test_two_processes_stay_in_step_and_train_as_one(tmp_path):
    """OwLore's adapters in float64, and LoRA's, of which DDP itself has nothing to average either."""
    run_in_two_processes("adapters", tmp_path)
    first, second = (torch.load(tmp_path / f"adapters-{rank}.pt") for rank in range(2))
    assert first["active"] == second["active"] and len(set(map(tuple, first["active"]))) > 1
    for kind in ("owlore", "lora"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name
        for name, value in first[f"{kind} alone"].items():
            torch.testing.assert_close(first[kind][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_accelerate_saves_and_goes_on(tmp_path):
    from accelerate import Accelerator

    def begin():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted()
        return accelerator, *accelerator.prepare(model, OwLoreAdamW(model, lr=1e-2, n_active=2, interval=3))

    def go(accelerator, model, optimizer, first, last):
        for micro in range(first, last):
            ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(micro))
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                optimizer.step()
                optimizer.zero_grad()

    whole = begin()
    go(*whole, 0, 10)
    whole[0].save_state(str(tmp_path))
    go(*whole, 10, 20)
    resumed = begin()
    resumed[0].load_state(str(tmp_path))
    go(*resumed, 10, 20)
    for name, value in whole[1].state_dict().items():
        assert torch.equal(resumed[1].state_dict()[name], value), name


def test_with_sfttrainer(tmp_path):
    """TRL puts the adapter on by itself, by `peft_config`."""
    import datasets
    import trl

    from tests.tiny_tokenizers import WORDS, gpt_like

    tokenizer = gpt_like()
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", bf16=False, disable_tqdm=True
    )
    trainer = trl.SFTTrainer(
        build("llama", vocab_size=len(tokenizer)),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": [" ".join(WORDS)] * 16}),
        processing_class=tokenizer,
        peft_config=OwLoreConfig(r=4),
        optimizer_cls_and_kwargs=owlore(n_active=1, interval=50, lr=1e-2),
    )
    trainer.train()
    moved = {name for name, m in trainer.model.named_modules() if isinstance(m, Increment) and m.has_basis}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert {layer_of(name) for name in moved} == set(optimizer.active)


def test_modules_to_save_always_train(tmp_path):
    from transformers import AutoModelForSequenceClassification

    build("llama").save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    model = get_peft_model(base.train(), OwLoreConfig(r=4, modules_to_save=["score"], task_type="SEQ_CLS"))
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=1, interval=2)
    head = model.base_model.model.score.modules_to_save["default"].weight
    for _ in range(3):
        before = head.detach().clone()
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(head, before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_only_the_drawn_layers_lora_trains(use_dora):
    model = get_peft_model(build("llama").train(), LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora))
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=1, interval=2, rank=None)
    draws = set()
    for step in range(6):
        active, before = optimizer.active[0], {n: p.detach().clone() for n, p in model.named_parameters()}
        draws.add(active)
        with model.disable_adapter():  # after which PEFT lets every adapter train
            logits(model)
        train(model, optimizer, 1, step)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {layer_of(name) for name in moved} == {active} and all("lora" in name for name in moved)
    assert len(draws) > 1


def test_lora_beside_a_rank_is_refused():
    model = get_peft_model(build("llama").train(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"rank: expected None with LoRA adapters, .* got 128"):
        OwLoreAdamW(model, n_active=1)


def test_ranks_follow_scores_at_the_cost_of_uniform_ones():
    model = build("llama")
    counts = [model_count(model, index) for index in range(4)]
    scores = LayerScores("tiny", "owl", [3.0, 1.0, 2.0, 1.0], counts)
    config = LoraConfig(**lora_ranks(model, scores, r=8), target_modules="all-linear")
    ranks = list(config.rank_pattern.values())
    assert 12 >= ranks[0] > ranks[2] > ranks[1] >= ranks[3] >= 4 and sum(ranks) == 32
    adapted_model = get_peft_model(build("llama"), config)
    for index, layer in enumerate(adapted_model.base_model.model.model.layers):
        assert layer.mlp.up_proj.r["default"] == layer.self_attn.q_proj.r["default"] == ranks[index]
        assert layer.mlp.up_proj.scaling["default"] == 2
    alike = get_peft_model(build("llama"), LoraConfig(r=8, target_modules="all-linear"))
    assert adapted_model.get_nb_trainable_parameters() == alike.get_nb_trainable_parameters()
    plan = allocate(scores, "rank", budget=0.25, spread=0.2)
    planned = list(lora_ranks(adapted_model, plan, r=8)["rank_pattern"].values())
    assert planned[0] > planned[2] > planned[1] and sum(planned) == 32


def model_count(model, index):
    return sum(m.weight.numel() for m in model.model.layers[index].modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize(
    "layers, size, arguments, message",
    [
        (3, None, {}, "scores: expected those of a model with 4 layers, got 3"),
        (4, 7, {}, "scores: expected those of a model with .* weights in layer 0, got one with 7 .tiny."),
        (4, None, {"r": 0}, "r: expected at least 1, got 0"),
        (4, None, {"r": 10**9}, "r: expected at most 100000, got 1000000000"),
        (4, None, {"relative_spread": 2.0}, "relative_spread: expected a share between 0 and 1, got 2.0"),
    ],
)
def test_bad_ranks(layers, size, arguments, message):
    model = build("llama")
    scores = LayerScores("tiny", "owl", [1.0] * layers, [size or model_count(model, 0)] * layers)
    for given in (scores, allocate(scores, "rank", budget=0.5)) if size else (scores,):
        with pytest.raises(ValueError, match=message):
            lora_ranks(model, given, **arguments)


def test_an_allocation_of_something_else_has_no_ranks():
    scores = LayerScores("tiny", "owl", [1.0, 2.0, 3.0, 4.0], [model_count(build("llama"), 0)] * 4)
    with pytest.raises(ValueError, match="scores: expected an allocation of rank above 0, got one of sparsity"):
        lora_ranks(build("llama"), allocate(scores, "sparsity", budget=0.5))


def test_smollm2_learns_a_text(smollm2, brown_text, tmp_path):
    """On real weights: a few steps on Brown's first words, saved, loaded and merged."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(brown_text[:1000], return_tensors="pt").input_ids[:, :64]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).train(), OwLoreConfig(r=16)
    )
    optimizer = OwLoreAdamW(model, lr=2e-3, n_active=3, interval=4)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, expected, atol=5e-3, rtol=1e-3)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10e6  # of 538 MB
