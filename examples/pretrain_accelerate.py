"""Pre-trains a Llama with the norm placement of your choice, by a loop of one's own around accelerate.

    python examples/pretrain_accelerate.py --norm_placement lns
    accelerate launch --num_processes 8 examples/pretrain_accelerate.py --preset 130M                     # DDP
    accelerate launch --use_fsdp --fsdp_version 2 examples/pretrain_accelerate.py --preset 1B             # FSDP2

The same settings, text, order and results as examples/pretrain.py; for those who want to change the loop. The same
command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser, get_scheduler

from hf_cod import LayerMonitor
from hf_cod.files import write_json
from hf_cod.pretraining import (
    FINAL_LEARNING_RATE_SHARE,
    PackedStream,
    Prepared,
    PretrainSettings,
    accumulation_steps,
    last_checkpoint,
    prepare,
    training_report,
)
from hf_cod.report import RunReport

MARKER = "progress.json"  # written last of a checkpoint: step and history
KEPT_CHECKPOINTS = 2


class Run:
    """Model, optimizer, schedule and the place in the run, prepared by accelerate."""

    def __init__(self, settings: PretrainSettings) -> None:
        recipe = settings.recipe
        self.settings = settings
        self.accelerator = Accelerator(
            mixed_precision="bf16" if settings.precision == "bf16" else "no",
            cpu=not torch.accelerator.is_available(),
            # One process reads a stream and hands out its windows, so that their order is that of one process.
            dataloader_config=DataLoaderConfiguration(dispatch_batches=True if recipe.stream else None),
        )
        self.accumulation = accumulation_steps(recipe, self.accelerator.num_processes)
        self.prepared: Prepared = prepare(settings)
        model = self.accelerator.prepare_model(self.prepared.model)
        # Without weight decay AdamW is Adam. Made behind prepare_model, because FSDP2 replaces the parameters.
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        self.schedule = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=recipe.warmup_steps,
            num_training_steps=recipe.steps,
            scheduler_specific_kwargs={"min_lr_rate": FINAL_LEARNING_RATE_SHARE},
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.bare = model
        self.model = torch.compile(model) if settings.compile else model
        self.step = 0
        self.history: list[dict[str, float]] = []

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        import json

        folder = last_checkpoint(str(self.settings.output), MARKER)
        if folder is not None:
            self.accelerator.load_state(str(folder))
            progress = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            self.step, self.history = progress["step"], progress["history"]

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's micro-batches from the present step on."""
        recipe = self.settings.recipe
        train, first = self.prepared.train, self.step * recipe.batch_size
        if isinstance(train, PackedStream):
            train.start_at(first)
        else:
            train = Subset(train, range(first, len(train)))  # type: ignore[arg-type]
        yield from self.accelerator.prepare_data_loader(DataLoader(train, batch_size=recipe.micro_batch_size))

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]], monitor: LayerMonitor) -> torch.Tensor:
        """One optimizer step; the mean loss of this process's micro-batches."""
        total = torch.zeros((), device=self.accelerator.device)
        for micro in range(self.accumulation):
            # Gradients are averaged over processes with the last micro-batch alone.
            last = micro == self.accumulation - 1
            with self.accelerator.no_sync(self.bare) if not last else _nothing():
                loss = self.model(**next(batches)).loss / self.accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
        self.step += 1
        monitor.read_gradients(self.step)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        monitor.probe(self.step)
        return total

    def evaluate(self) -> float:
        """Mean validation loss over all processes."""
        recipe = self.settings.recipe
        loader = DataLoader(self.prepared.validation, batch_size=recipe.micro_batch_size)
        self.model.eval()
        losses = []
        with torch.no_grad():
            for batch in self.accelerator.prepare_data_loader(loader):
                losses.append(self.model(**batch).loss.repeat(len(batch["input_ids"])))
        self.model.train()
        gathered = self.accelerator.gather(torch.cat(losses))
        return gathered[: len(self.prepared.validation)].mean().item()  # type: ignore[arg-type]

    def save(self) -> None:
        """Writes a checkpoint and removes old ones."""
        output = Path(str(self.settings.output))
        self.accelerator.save_state(str(output / f"checkpoint-{self.step}"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {"step": self.step, "history": self.history}
            write_json(output / f"checkpoint-{self.step}" / MARKER, progress)
            steps = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-[0-9]*"))
            for step in steps[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(output / f"checkpoint-{step}")
        self.accelerator.wait_for_everyone()
