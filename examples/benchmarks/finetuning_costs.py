"""Cost of a fine-tuning step: estimated and measured memory, and time relative to LoRA."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from allocator import peak_added
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_cod.io.journal import Journal
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.estimate import estimate_memory, fill_adapters, take_worst_draw
from hf_cod.training.runs.memory import PARTS, Memory, train_steps
from hf_cod.training.runs.methods import set_up

RATE = 1e-4
FUSED = "owlore, fused"  # OwLore with its update inside the backward pass
BASE = "lora"  # baseline of times
# The 7B claim: bytes, and settings of the training.
BOUND = 21e9
N_ACTIVE_7B, RANK_7B, LORA_RANK_7B, TOKENS_7B = 5, 128, 16, 2048
STEPS_7B = 5  # timed steps


def variants(methods: Sequence[str]) -> list[str]:
    """The methods, with the fused form of OwLore after OwLore."""
    return [name for method in methods for name in (method, FUSED)[: 1 + (method == "owlore")]]


def chosen(name: str, n_active: int, rank: int, interval: int = 50) -> tuple[str, OwLoreSettings]:
    """Method and settings for the name of a row."""
    settings = OwLoreSettings(n_active=n_active, interval=interval, rank=rank, fused=name == FUSED)
    return name.split(",")[0], settings


def build(a: argparse.Namespace, name: str, checkpointing: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model in float32 and the method's optimizer."""
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    method, settings = chosen(name, a.n_active, a.rank, a.interval)
    return set_up(method, model, None, settings, RATE, a.lora_rank)


def random_batch(a: argparse.Namespace, vocabulary: int) -> dict[str, torch.Tensor]:
    """Tokens, which are also the labels."""
    ids = torch.randint(vocabulary, (a.cost_batch, a.cost_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def measured_bytes(a: argparse.Namespace, name: str, checkpointing: bool) -> int:
    """Peak memory of two training steps by torch's allocator, with the worst-case layers sampled."""
    model, optimizer = build(a, name, checkpointing)
    fill_adapters(model)
    take_worst_draw(optimizer)
    batch = random_batch(a, model.config.vocab_size)
    tensors = (*model.parameters(), *model.buffers(), *batch.values())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    with torch.profiler.profile(profile_memory=True) as profiler:
        train_steps(model, optimizer, batch)
    return sum(storages.values()) + peak_added(profiler)


def measure_memory(a: argparse.Namespace, journal: Journal) -> list[dict[str, Any]]:
    """A row for each method, with and without checkpointing: estimated bytes of each part, and the measured peak."""
    rows = []
    for checkpointing in (False, True):
        for name in variants(a.methods):
            key = f"memory {name} checkpointing {checkpointing}"
            if key not in journal:
                estimate = estimate_memory(
                    AutoConfig.from_pretrained(a.model),
                    *chosen(name, a.n_active, a.rank),
                    micro_batch_size=a.cost_batch,
                    sequence_length=a.cost_tokens,
                    checkpointing=checkpointing,
                    lora_rank=a.lora_rank,
                )
                told = {"method": name, "checkpointing": checkpointing, **estimate.parts(), "total": estimate.total}
                journal.add(key, {**told, "measured": measured_bytes(a, name, checkpointing)})
            rows.append(journal[key])
    return rows


def memory_table(rows: list[dict[str, Any]], unit: float = 2**20, name: str = "MiB") -> str:
    """The rows as Markdown."""
    columns = [*PARTS, "total"] + ["measured"] * ("measured" in rows[0])
    rows = [row for row in rows if row.get("measured", 1)]  # without methods that did not fit
    lines = [f"| method, {name} | checkpointing | " + " | ".join(columns) + " | estimate / measured |"]
    lines += ["|---|---|" + "---:|" * (len(columns) + 1)]
    for row in rows:
        cells = " | ".join(f"{row[column] / unit:,.{0 if unit == 2**20 else 2}f}" for column in columns)
        ratio = f"{row['total'] / row['measured']:.3f}" if "measured" in row else "-"
        lines.append(f"| `{row['method']}` | {'yes' if row['checkpointing'] else 'no'} | {cells} | {ratio} |")
    return "\n".join([*lines, ""])


def claim_7b(methods: Sequence[str], measure: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Methods on LLaMA2-7B's shapes in bfloat16, one sample of 2048 tokens, and whether OwLore meets the claim.

    Args:
        methods: names of `METHODS`, `owlore` among them.
        measure: whether each is also trained, on a CUDA device.
    """
    config = LlamaConfig(  # LLaMA2-7B
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, vocab_size=32000
    )
    rows = []
    for name in variants(methods):
        for checkpointing in (True, False):
            found: Memory = estimate_memory(
                config,
                *chosen(name, N_ACTIVE_7B, RANK_7B),
                micro_batch_size=1,
                sequence_length=TOKENS_7B,
                dtype=torch.bfloat16,
                checkpointing=checkpointing,
            )
            row = {"method": name, "checkpointing": checkpointing, **found.parts(), "total": found.total}
            rows.append(row | (measured_on_cuda(config, name, checkpointing) if measure else {}))
            print(name, f"{found.total / 1e9:.2f} GB", rows[-1].get("measured", ""), flush=True)
    owlore = next(row["total"] for row in rows if row["method"] == "owlore" and row["checkpointing"])
    verdict = "holds" if owlore <= BOUND else "does not hold"
    return rows, f"owlore with checkpointing requires {owlore / 1e9:.2f} GB; at most {BOUND / 1e9:g} GB: {verdict}."


def measured_on_cuda(config: LlamaConfig, name: str, checkpointing: bool) -> dict[str, Any]:
    """Peak of CUDA's allocator over training steps from random weights, in bytes, and seconds per step after the
    first two; both None if the device is too small.
    """
    gc.collect()  # reference cycles of a run that did not fit
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            ids = torch.randint(config.vocab_size, (1, TOKENS_7B))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        method, settings = chosen(name, N_ACTIVE_7B, RANK_7B)
        model, optimizer = set_up(method, model, None, settings, RATE, LORA_RANK_7B)
        fill_adapters(model)
        take_worst_draw(optimizer)
        batch = {"input_ids": ids, "labels": ids.clone()}
        train_steps(model, optimizer, batch)
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_steps(model, optimizer, batch, steps=STEPS_7B)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / STEPS_7B
    except torch.OutOfMemoryError:
        return {"measured": None, "seconds": None}
    return {"measured": torch.cuda.max_memory_allocated(), "seconds": seconds}


def measure_time(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step relative to LoRA: all methods take steps in turns, in another order each round.

    The ratio is that of the sums over all steps, because steps differ in cost: a basis is computed after each sampling.
    """
    names = [BASE, *(method for method in a.methods if method != BASE)]
    trained = {name: build(a, name, a.cost_checkpointing) for name in names}
    batch = random_batch(a, next(iter(trained.values()))[0].config.vocab_size)
    for model, optimizer in trained.values():
        train_steps(model, optimizer, batch, steps=1)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(a.rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            train_steps(*trained[name], batch, steps=1)
            seconds[name].append(time.perf_counter() - start)
    base = seconds[BASE]
    return [
        {
            "method": name,
            "seconds": statistics.fmean(values),
            "ratio": sum(values) / sum(base),
            "median ratio": statistics.median(mine / theirs for mine, theirs in zip(values, base, strict=True)),
        }
        for name, values in seconds.items()
    ]


def time_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| method | seconds a step | / {BASE} | median of rounds |", "|---|---:|---:|---:|"]
    lines += [
        f"| `{row['method']}` | {row['seconds']:.2f} | {row['ratio']:.3f} | {row['median ratio']:.3f} |" for row in rows
    ]
    return "\n".join([*lines, ""])
