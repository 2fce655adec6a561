"""Pre-trains a Llama with a given norm placement, with a custom training loop on accelerate.

    python examples/pretrain_accelerate.py --norm-placement lns
    accelerate launch --num_processes 8 examples/pretrain_accelerate.py --preset 130M                     # DDP
    accelerate launch --use_fsdp --fsdp_version 2 examples/pretrain_accelerate.py --preset 1B             # FSDP2

Settings, text, order and results are those of examples/pretrain.py; use this script to change the loop. The same
command resumes an interrupted run.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Subset
from transformers import get_scheduler

from hf_cod import LayerMonitor
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.files import write_json
from hf_cod.io.packing import PackedStream
from hf_cod.io.report import RunReport
from hf_cod.training.pretraining.checkpoints import PROGRESS, check_of_loop, read_progress
from hf_cod.training.pretraining.preparation import Prepared, prepare
from hf_cod.training.pretraining.recipes import FINAL_LEARNING_RATE_SHARE, PretrainSettings, accumulation_steps
from hf_cod.training.pretraining.results import save_results
from hf_cod.training.runs.run_directory import last_checkpoint, last_steps

KEPT_CHECKPOINTS = 2


class Run:
    """Model, optimizer, schedule and current step, prepared by accelerate."""

    def __init__(self, settings: PretrainSettings) -> None:
        recipe = settings.recipe
        self.settings = settings
        self.accelerator = Accelerator(
            mixed_precision="bf16" if settings.precision == "bf16" else "no",
            cpu=not torch.accelerator.is_available(),
            # One process reads a stream and distributes its windows, so that the order is that of one process.
            dataloader_config=DataLoaderConfiguration(dispatch_batches=True if recipe.stream else None),
        )
        self.accumulation = accumulation_steps(recipe, self.accelerator.num_processes)
        self.prepared: Prepared = prepare(settings)
        # AdamW without weight decay is Adam.
        optimizer = torch.optim.AdamW(
            self.prepared.model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True
        )
        self.bare, self.optimizer = self.accelerator.prepare(self.prepared.model, optimizer)
        self.model = torch.compile(self.bare) if settings.compile else self.bare
        self.schedule = get_scheduler(
            "cosine_with_min_lr",
            self.optimizer.optimizer,  # not accelerate's, which would step once for each process
            num_warmup_steps=recipe.warmup_steps,
            num_training_steps=recipe.steps,
            scheduler_specific_kwargs={"min_lr_rate": FINAL_LEARNING_RATE_SHARE},
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def resume(self) -> None:
        """Resumes from the newest complete checkpoint, if there is one."""
        check = partial(check_of_loop, self.prepared.model, self.optimizer.optimizer)
        folder = last_checkpoint(str(self.settings.output), PROGRESS, check)
        if folder is not None:
            self.accelerator.load_state(str(folder))
            progress = read_progress(folder, int(folder.name.rpartition("-")[2]))
            self.step, self.history = progress["step"], progress["history"]

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of this process from the current step on."""
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
            # Gradients are averaged over processes once, with the last micro-batch.
            last = micro == self.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.bare):
                loss = self.model(**next(batches)).loss / self.accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
        self.step += 1
        monitor.read_gradients(self.step)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        monitor.measure(self.step)
        return total

    def evaluate(self) -> float:
        """Mean validation loss over all processes."""
        loader = DataLoader(self.prepared.validation, batch_size=self.settings.recipe.micro_batch_size)
        self.model.eval()
        losses = []
        with torch.no_grad():
            for batch in self.accelerator.prepare_data_loader(loader):
                loss = self.model(**batch).loss.repeat(len(batch["input_ids"]))  # all windows are of one length
                losses.append(self.accelerator.gather_for_metrics(loss))
        self.model.train()
        return torch.cat(losses).mean().item()

    def log(self, figures: dict[str, float]) -> None:
        """Adds to the history, and prints."""
        self.history.append({"step": self.step, **figures})
        self.accelerator.print(self.history[-1])

    def save(self) -> None:
        """Writes a checkpoint and removes old ones."""
        output = Path(str(self.settings.output))
        self.accelerator.save_state(str(output / f"checkpoint-{self.step}"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {"step": self.step, "history": self.history}
            write_json(output / f"checkpoint-{self.step}" / PROGRESS, progress)
            for _, folder in last_steps(output)[KEPT_CHECKPOINTS:]:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()


def pretrain(settings: PretrainSettings) -> RunReport | None:
    """Trains or resumes; saves and returns the report, on the main process only."""
    run = Run(settings)
    run.resume()
    history = Path(str(settings.output)) / "layer_diagnostics" / "history.jsonl"
    monitor = LayerMonitor(
        run.bare,
        run.prepared.probe,
        history=history,
        step=run.step,
        last=settings.recipe.steps,
        every=settings.diagnose_every,
    )
    run.model.train()
    batches, losses = run.batches(), []
    while run.step < settings.recipe.steps:
        losses.append(run.train_step(batches, monitor))
        if run.step % settings.log_every == 0:
            loss = run.accelerator.reduce(torch.stack(losses), "mean").mean().item()
            run.log({"loss": loss, "learning_rate": run.schedule.get_last_lr()[0]})
            losses = []
        if run.step % settings.evaluate_every == 0 or run.step == settings.recipe.steps:
            run.log({"eval_loss": run.evaluate()})
        if run.step % settings.save_every == 0 or run.step == settings.recipe.steps:
            run.save()
    return save_results(run.accelerator, run.bare, settings, run.prepared, run.history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, trains, prints the results."""
    parser = SettingsParser([PretrainSettings], description=__doc__.split("\n\n")[0])
    settings = parser.parse(sys.argv[1:] if arguments is None else arguments)[0]
    report = pretrain(settings)
    if report is not None:
        print("\n".join(report.summary))


if __name__ == "__main__":
    main()
