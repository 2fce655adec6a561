"""What tests run in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_cod import LayerDiagnosticsCallback, LayerMonitor, OwLoreAdamW, OwLoreConfig
from tests.replica_cases import (
    differences,
    ends,
    fails,
    killed_in_training,
    pretraining,
    raises_in_training,
    stays_away,
    weights,
)
from tests.tiny_models import batch_for, build
from tests.tiny_training import PROBE, rows, silenced


def ddp(folder: Path) -> None:
    """Trains replicas with and without the callback; each process writes what it saw."""
    watches = {
        "with": LayerDiagnosticsCallback(every=2, probe=PROBE),
        "without": None,
        "no dropout": LayerDiagnosticsCallback(every=1, probe=PROBE),
        "stopped": LayerDiagnosticsCallback(every=1, probe=PROBE, watch="stop"),
    }
    for name, watch in watches.items():
        model, batches = build("llama", attention_dropout=0.0 if name == "no dropout" else 0.1), []
        if name == "stopped":
            silenced(model, 2)

        def collate(samples, batches=batches):
            batches.append(default_data_collator(samples))
            return batches[-1]

        arguments = TrainingArguments(
            str(folder / name),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=rows(), data_collator=collate, callbacks=[watch] if watch else []
        )
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        weights = trainer.model.state_dict()
        seen = {"weights": weights, "batches": batches, "steps": trainer.state.global_step}
        torch.save(seen, folder / f"{name}-{dist.get_rank()}.pt")
        assert watch is None or bool(watch.monitor.history.lines) == (dist.get_rank() == 0)
        dist.barrier()


def fsdp(folder: Path) -> None:
    """Trains shards with and without a monitor, and one whole model beside them."""
    whole, found = build("llama"), {}
    batch = batch_for(whole)
    watch = LayerMonitor(whole, [batch_for(whole, "right")], every=1)
    for name in ("with", "without"):
        model = build("llama")
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = LayerMonitor(model, [batch_for(whole, "right")], every=2) if name == "with" else None
        for step in range(1, 5):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            if monitor:
                monitor.read_gradients(step)
            optimizer.step()
            optimizer.zero_grad()
            if monitor:
                line = monitor.measure(step)
                assert (line is not None) == (dist.get_rank() == 0 and step in (1, 2, 4))
        found[name] = {key: value.full_tensor() for key, value in model.state_dict().items()}
        if monitor:
            found["lines"] = monitor.history.lines
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for step in range(1, 5):
        whole(**batch, labels=batch["input_ids"]).loss.backward()
        watch.read_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        watch.measure(step)
    if dist.get_rank() == 0:
        torch.save({**found, "whole": watch.history.lines}, folder / "fsdp.pt")


def owlore(folder: Path) -> None:
    """Trains replicas with accumulation and clipping, and one model beside them on the tokens of both."""
    rank, found = dist.get_rank(), {"active": []}
    for name in ("together", "alone"):
        model = build("llama").double()  # two directions of nearly equal weight take the least rounding far
        optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2, rank=4, floor=1.0)
        replica = torch.nn.parallel.DistributedDataParallel(model) if name == "together" else model
        for step in range(6):
            ids = torch.randint(3, 99, (2, 2, 2, 12), generator=torch.Generator().manual_seed(step))
            for micro in range(2):  # (process, micro-batch, sample, token)
                for part in [ids[rank, micro]] if name == "together" else ids[:, micro]:
                    loss = replica(input_ids=part, labels=part).loss / (2 if name == "together" else 4)
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if name == "together":
                found["active"].append(optimizer.active)
        found["weights" if name == "together" else "alone"] = model.state_dict()
    torch.save(found, folder / f"owlore-{rank}.pt")


def owlore_shards(folder: Path) -> None:
    """Tries to train shards; writes which of them are refused."""
    refused, batch = [], batch_for(build("llama"))
    for name in ("fsdp1", "fsdp1 after", "fsdp2", "fsdp2 after"):
        inner = model = build("llama")
        optimizer = OwLoreAdamW(model, n_active=2, rank=4) if "after" in name else None
        if "fsdp1" in name:
            model = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        try:
            optimizer = optimizer or OwLoreAdamW(model, n_active=2, rank=4)
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
        except ValueError as error:
            if "model: expected unsharded parameters, got sharded ones" in str(error):
                refused.append(name)
    torch.save(refused, folder / f"shards-{dist.get_rank()}.pt")


def adapters(folder: Path) -> None:
    """As `owlore`, of models with OwLore's and with LoRA's adapters."""
    from peft import LoraConfig, get_peft_model

    rank, found = dist.get_rank(), {"active": []}
    for kind in ("owlore", "lora"):
        for name in (kind, f"{kind} alone"):
            config = OwLoreConfig(r=4, max_rank=6) if kind == "owlore" else LoraConfig(target_modules="all-linear")
            torch.manual_seed(1)
            model = get_peft_model(build("llama").double(), config)
            settings = {} if kind == "owlore" else {"rank": None}
            optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2, floor=1.0, **settings)
            replica = torch.nn.parallel.DistributedDataParallel(model) if name == kind else model
            for step in range(6):
                ids = torch.randint(3, 99, (2, 2, 2, 12), generator=torch.Generator().manual_seed(step))
                for micro in range(2):  # (process, micro-batch, sample, token)
                    # One model sees what both see in a micro-batch at once: a basis comes from the first.
                    part = ids[rank, micro] if name == kind else ids[:, micro].flatten(0, 1)
                    (replica(input_ids=part, labels=part).loss / 2).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                if name == kind:
                    found["active"].append(optimizer.active)
            merged = model.merge_and_unload()
            found[name] = {key: value for key, value in merged.state_dict().items() if "proj" in key}
    torch.save(found, folder / f"adapters-{rank}.pt")


def run() -> None:
    """Runs the function that the command line names, in the folder that it names, in each process."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    known = (ddp, fsdp, owlore, owlore_shards, adapters, weights, differences, pretraining, fails, ends, stays_away)
    known += (raises_in_training, killed_in_training)
    {function.__name__: function for function in known}[what](folder)
    dist.destroy_process_group()
