"""Trains low-rank adapters on a pruned model and merges them without filling a zero."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.io.arguments import checked
from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import IGNORED_LABEL, Batches, Texts, Tokenizer
from hf_cod.layers.batches import batches_of, check_needed, required
from hf_cod.layers.checks import check_writable
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.modes import for_one_thread, gradients_restored, modes_restored
from hf_cod.layers.running import progress
from hf_cod.layers.running_averages import averages_kept
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of
from hf_cod.training.healing.masked_adapters import lora_layers, mask_forward, merge_masked
from hf_cod.training.healing.settings import RecoveryFields, RecoverySettings
from hf_cod.training.runs.adapter_targets import adapter_targets
from hf_cod.training.runs.new_adapters import require_peft, with_adapters

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

logger = logging.getLogger(__name__)


@renamed(path="layers_path")
@for_one_thread
@checked
def recover(
    model: nn.Module,
    batches: Batches | None = None,
    steps: int | None = None,
    *,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: RecoverySettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[RecoveryFields],
) -> list[float]:
    """Trains PEFT's LoRA on the layers' matrices of a pruned language model and merges it in place; zeros stay zeros.

    The adapters are masked in the forward pass (`masked_adapters.py`). Products with W cost as much as in full
    fine-tuning (a gradient of W's size for one matrix at a time, and the masked weights of all layers in memory until
    the backward pass); the optimizer's state does not. Banks of experts are not trained. The optimizer is AdamW without
    weight decay, alpha = 2 r; the learning rate warms up over a tenth of the steps, then follows a cosine to zero
    (transformers' schedule).

    Args:
        model: a pruned model with a language modelling head; train mode and gradient flags are restored afterwards.
        batches: dicts with input_ids, attention_mask and, for a masked language model, labels; `token_batches` makes
            them from texts. Each step takes one.
        steps: number of steps; default: 100, or fewer if 20 passes over the batches take fewer.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        layers_path: module name of the layer stack, if it cannot be found.
        show_progress: show a progress bar.
        settings: `RecoverySettings`, instead of single fields.
        **fields: fields of `RecoverySettings` by name: rank (r), learning_rate (peak), seed;
            for texts, also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Returns:
        The loss of each step, before its update, in nats per token.

    Raises:
        ImportError: peft is not installed.
        ValueError: no batches, weights that cannot be written (quantized, packed, adapted), or a loss that is not
            finite; the model is then unchanged.
    """
    how = resolve(recover, RecoverySettings, settings, fields, steps=steps)
    stack = find_decoder_layers(model, layers_path)
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    check_needed(batches, "to recover on")
    check_inputs(stack.model, batches)
    task = task_of(stack.model, batches)
    if task not in LANGUAGE_MODELS:
        why = "batches without labels" if task == "unlabelled" else type(stack.model).__name__
        raise ValueError(f"recover: expected a language model, and labels for a masked one, got {why}")
    check_writable(stack)
    check_unwritten(stack.model)
    device = execution_device(stack.model)
    generator, steps = torch.Generator().manual_seed(how.seed), how.steps_on(len(batches))
    with _adapted(stack, how.rank, how.seed) as adapters, torch.enable_grad():
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0)
        # Reaches zero one step after the last, so that the last step trains, too.
        schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer, max(1, steps // 10), steps + 1, min_lr_rate=0.0
        )
        losses = []
        order: list[int] = []
        for step in progress(range(steps), "recovery", show_progress):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            loss = _loss(stack.model, to_device(batches[order.pop()], device))
            if not loss.isfinite():
                raise ValueError(
                    f"recover: expected a finite loss, got {loss.item()} at step {step}; lower learning_rate"
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        for adapter in adapters:
            merge_masked(adapter)
    return losses


@contextmanager
def _adapted(stack: DecoderLayers, rank: int, seed: int) -> Iterator[list[Any]]:
    """Adds PEFT's LoRA layers, with a masked forward pass, to the layers' matrices; removes them after the block."""
    require_peft("recover")
    from peft import LoraConfig

    model: Any = stack.model
    targets = adapter_targets(stack)
    for note in targets.notes() if targets.left else ():
        logger.warning("recover: %s", note)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **targets.for_lora())
    with modes_restored(model), gradients_restored(model.parameters()):
        wrapped = with_adapters(model, config, seed)
        try:
            adapters = lora_layers(model)
            for adapter in adapters:
                mask_forward(adapter)
            model.train()
            with averages_kept(model):
                yield adapters
        finally:
            wrapped.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        batch = {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, IGNORED_LABEL)}
    return model(**batch).loss
