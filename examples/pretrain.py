"""Pre-trains a Llama with a given norm placement, with transformers' Trainer.

    python examples/pretrain.py --norm-placement lns                       # a tiny model, minutes on a laptop's CPU
    accelerate launch examples/pretrain.py --preset 130M --norm-placement lns --compile     # the paper's, on C4
    accelerate launch --use_fsdp --fsdp_version 2 examples/pretrain.py --preset 1B --micro-batch-size 8

Presets hold the settings of "The Curse of Depth in Large Language Models" (arXiv 2502.05795); any of them can be
changed. The same command resumes an interrupted run, with the same final weights. It writes checkpoints, the model
(which loads with trust_remote_code, without hf_cod) and report.json to --output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_cod import LayerDiagnosticsCallback
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.packing import PackedStream
from hf_cod.io.report import RunReport
from hf_cod.training.pretraining.checkpoints import check_of_trainer
from hf_cod.training.pretraining.preparation import Build, prepare
from hf_cod.training.pretraining.recipes import FINAL_LEARNING_RATE_SHARE, PretrainSettings, accumulation_steps
from hf_cod.training.pretraining.results import save_results
from hf_cod.training.runs.run_directory import last_checkpoint, last_steps
from hf_cod.training.runs.trainer import show_progress

STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that Trainer writes


def training_arguments(settings: PretrainSettings, streams: bool) -> TrainingArguments:
    """The recipe as TrainingArguments."""
    recipe = settings.recipe
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        train_sampling_strategy="sequential",  # the dataset has an order of its own
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FINAL_LEARNING_RATE_SHARE},
        warmup_steps=recipe.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=0.0,  # AdamW without weight decay is Adam
        max_grad_norm=0.0,
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),
        # A stream seeks its window by bookmarks, which is faster than reading everything before it.
        ignore_data_skip=streams,
    )
    # Without a launcher, each of several GPUs processes one micro-batch in every forward pass.
    arguments.gradient_accumulation_steps = accumulation_steps(recipe, arguments.world_size * max(1, arguments.n_gpu))
    return arguments


def pretrain(
    settings: PretrainSettings, build: Build | None = None, trainer_class: type[Trainer] = Trainer
) -> RunReport | None:
    """Trains or resumes; saves and returns the report, on the main process only. `build` is that of `prepare`."""
    prepared = prepare(settings, build)
    arguments = training_arguments(settings, prepared.streams)
    trainer = trainer_class(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=default_data_collator,  # windows need no padding
        processing_class=prepared.tokenizer,
        callbacks=[LayerDiagnosticsCallback(every=settings.diagnose_every, probe=prepared.probe)],
    )
    show_progress(trainer)
    if last_steps(arguments.output_dir):
        trainer.create_optimizer()  # as Trainer does later; checkpoints are compared with it
    checkpoint = last_checkpoint(arguments.output_dir, STATE_FILE, partial(check_of_trainer, trainer))
    if checkpoint is not None and isinstance(prepared.train, PackedStream):
        prepared.train.start_at(int(checkpoint.name.rsplit("-", 1)[1]) * settings.recipe.batch_size)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return save_results(trainer.accelerator, trainer.model_wrapped, settings, prepared, trainer.state.log_history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, trains, prints the results."""
    parser = SettingsParser([PretrainSettings], description=__doc__.split("\n\n")[0])
    settings = parser.parse(sys.argv[1:] if arguments is None else arguments)[0]
    report = pretrain(settings)
    if report is not None:
        print("\n".join(report.summary))


if __name__ == "__main__":
    main()
