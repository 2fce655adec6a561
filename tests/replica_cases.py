"""What two processes do that begin differently: trainings that end alike, and what is refused on both."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cod import LayerDiagnosticsCallback, LayerScores, OwLoreAdamW, OwLoreConfig, owlore
from hf_cod.layers import replicas
from hf_cod.training.pretraining.preparation import prepare
from hf_cod.training.pretraining.recipes import PretrainSettings
from tests.tiny_models import batch_for, build
from tests.tiny_training import PROBE, rows

# Method -> (kind of adapter, settings of OwLoreAdamW or None for AdamW).
METHODS = {
    "owlore": (None, {"rank": 4, "n_active": 2}),
    "lisa": (None, {"rank": None, "n_active": 2, "train_embeddings": True, "floor": 1.0}),
    "galore": (None, {"rank": 4, "n_active": 4}),
    "owlore-peft": ("owlore", {"n_active": 2}),
    "lora drawn": ("lora", {"rank": None, "n_active": 2}),
    "lora": ("lora", None),
    "full": (None, None),
}


def own_model(adapter: str | None = None, kind: str = "llama"):
    """A model whose weights, adapters included, are of this process alone."""
    from peft import LoraConfig, get_peft_model

    model = build(kind)
    if adapter is not None:
        config = OwLoreConfig(r=4, max_rank=6) if adapter == "owlore" else LoraConfig(target_modules="all-linear")
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and 0 not in p.stride():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model


def step(model, optimizer, seed: int = 0) -> None:
    """One step on tokens of this process alone."""
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    ids = torch.randint(3, 99, (2, 12), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def by_hand(model, settings: dict | None):
    """Trains in a loop."""
    if settings is None:
        replica = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    else:
        optimizer = OwLoreAdamW(model, lr=1e-2, interval=2, **settings)
        replica = DistributedDataParallel(model)
    for seed in range(3):  # draws twice
        step(replica, optimizer, seed)


def by_trainer(model, settings: dict | None, folder: Path):
    """Trains by Trainer."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    how = None if settings is None else owlore(lr=1e-2, interval=2, **settings)
    Trainer(model, arguments, train_dataset=rows(), optimizer_cls_and_kwargs=how).train()


def weights(folder: Path) -> None:
    """Trains by each method from weights that differ; writes those of the end."""
    found = {}
    for name, (adapter, settings) in METHODS.items():
        for way in ("loop", "Trainer"):
            model = own_model(adapter)
            torch.manual_seed(dist.get_rank())
            by_hand(model, settings) if way == "loop" else by_trainer(model, settings, folder / name)
            found[f"{name} by {way}"] = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(found, folder / f"weights-{dist.get_rank()}.pt")


def _make(**settings):
    return OwLoreAdamW(own_model(), **{"rank": 4, "n_active": 2, **settings})


def _scores(model, mine: float) -> LayerScores:
    import hf_cod

    scores = hf_cod.score_layers(model, method="angular", batches=[batch_for(model)], show_progress=False)
    return type(scores)(**{**vars(scores), "values": [1.0, 2.0, 3.0, mine]})


def _scored(rank: int) -> None:
    model = own_model()
    OwLoreAdamW(model, _scores(model, 1.0 + rank), rank=4, n_active=2)


def _adapters(rank: int) -> None:
    from peft import get_peft_model

    OwLoreAdamW(get_peft_model(build("llama"), OwLoreConfig(r=4 + rank, max_rank=9)), n_active=2)


def _wrapped(inside: bool) -> None:
    replica = DistributedDataParallel(own_model())
    OwLoreAdamW(replica.module if inside else replica, rank=4, n_active=2)


def _loaded_later(rank: int) -> None:
    optimizer = _make()
    replica = DistributedDataParallel(optimizer.layers.model)
    replica.module.load_state_dict(own_model().state_dict())
    step(replica, optimizer)


def _rate_later(rank: int) -> None:
    optimizer = _make()
    replica = DistributedDataParallel(optimizer.layers.model)
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 + rank)
    step(replica, optimizer)


def _unwrapped(rank: int) -> None:
    optimizer = _make()
    step(optimizer.layers.model, optimizer)


def _resumed(rank: int) -> None:
    optimizer = _make()
    replica, saved = DistributedDataParallel(optimizer.layers.model), []
    for seed in range(2):
        step(replica, optimizer, seed)
        saved.append(optimizer.state_dict())
    optimizer.load_state_dict(saved[rank])


def _trainer(folder: Path, rank: int) -> None:
    by_trainer(own_model(), {"rank": 4, "n_active": 2, "seed": rank}, folder)


def differences(folder: Path) -> None:
    """Tries what must be refused on both; writes what each said, and that the next training is right."""
    rank = dist.get_rank()
    cases = {
        "seed": lambda: _make(seed=rank),
        "n_active": lambda: _make(n_active=2 + rank),
        "interval": lambda: _make(interval=2 + rank),
        "rank": lambda: _make(rank=4 + rank),
        "lr": lambda: _make(lr=1e-3 * (1 + rank)),
        "betas": lambda: _make(betas=(0.9, 0.99 + rank / 1000)),
        "scores": lambda: _scored(rank),
        "r": lambda: _adapters(rank),
        "frozen": lambda: OwLoreAdamW(own_model(None, ("llama", "qwen2")[rank]), rank=4, n_active=2),
        "fails on one": lambda: _make(n_active=2 + 97 * rank),
        "in DDP": lambda: _wrapped(inside=False),
        "inside of DDP": lambda: _wrapped(inside=True),
        "weights loaded later": lambda: _loaded_later(rank),
        "rate changed later": lambda: _rate_later(rank),
        "not in DDP": lambda: _unwrapped(rank),
        "resumed differently": lambda: _resumed(rank),
        "Trainer": lambda: _trainer(folder, rank),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    model = own_model()
    by_hand(model, METHODS["owlore"][1])
    said["afterwards"] = replicas.digest_weights(model)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def pretraining(folder: Path) -> None:
    """Prepares runs whose settings differ, then one that both begin."""
    rank, said = dist.get_rank(), {}
    with replicas.first_process_first():
        time.sleep(0 if rank else 0.2)
        said["before"] = [path.name for path in folder.glob("was-here-*")]
        (folder / f"was-here-{rank}").touch()
    (folder / f"text-{rank}.txt").write_text("some words of a text " * 200)
    for field, values in {"seed": (0, 1), "steps": (4, 5), "output": ("a", "b"), None: (0, 0)}.items():
        options = {"text": str(folder / "text-0.txt"), "sequence_length": 16, "steps": 4, "output": str(folder / "run")}
        settings = PretrainSettings(**{**options, **({field: values[rank]} if field else {})})
        try:
            prepared = prepare(settings)
            said["equal"] = replicas.digest_weights(prepared.model)
        except ValueError as error:
            said[field] = str(error)
    dist.barrier()
    if rank == 0:
        (folder / "run" / "config.json").write_text("{}")
    dist.barrier()
    try:
        prepare(settings)
    except ValueError as error:
        said["claim"] = str(error)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def fails(folder: Path) -> None:
    """One process raises in a step and ends; the other one waits for it."""
    rank = dist.get_rank()
    optimizer = _make()
    replica = DistributedDataParallel(optimizer.layers.model)
    step(replica, optimizer)
    try:
        optimizer.step() if rank else step(replica, optimizer)
    except (ValueError, RuntimeError) as error:
        (folder / f"said-{rank}.json").write_text(json.dumps(str(error)))
    sys.exit(0)


def ends(folder: Path) -> None:
    """One process is gone while the other one waits for its gradient."""
    if dist.get_rank():
        os._exit(0)
    try:
        replicas.average(torch.ones(3))
    except RuntimeError as error:
        (folder / "said-0.json").write_text(json.dumps(str(error)))
    os._exit(0)


def _ends_in_training(folder: Path, end: Callable[[], None]) -> None:
    """One process ends in the third of a hundred steps of Trainer; each writes when it was out of the training."""

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **about):
            if state.global_step == 3 and dist.get_rank():
                (folder / "time-1").write_text(str(time.time()))
                end()

    arguments = TrainingArguments(
        str(folder),
        max_steps=100,
        per_device_train_batch_size=2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    how = owlore(lr=1e-2, interval=2, rank=4, n_active=2)
    watch = LayerDiagnosticsCallback(every=2, probe=PROBE)
    trainer = Trainer(
        own_model(), arguments, train_dataset=rows(), optimizer_cls_and_kwargs=how, callbacks=[Ends(), watch]
    )
    try:
        trainer.train()
    finally:
        if not dist.get_rank():
            (folder / "time-0").write_text(str(time.time()))


def raises_in_training(folder: Path) -> None:
    """One process raises, and nothing catches it."""

    def end() -> None:
        raise ValueError("batches: expected this error")

    _ends_in_training(folder, end)


def killed_in_training(folder: Path) -> None:
    """One process is killed."""
    _ends_in_training(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stays_away(folder: Path) -> None:
    """One process makes an optimizer, which the other one never does."""
    replicas.LIMIT = 1.0
    if dist.get_rank() == 0:
        try:
            _make()
        except ValueError as error:
            (folder / "said-0.json").write_text(json.dumps(str(error)))
    _end(folder)


def _end(folder: Path) -> None:
    """Ends when both are done, without a word to the other: collectives are under way that nobody ends."""
    (folder / f"done-{dist.get_rank()}").touch()
    while len([*folder.glob("done-*")]) < 2:
        time.sleep(0.05)
    os._exit(0)
