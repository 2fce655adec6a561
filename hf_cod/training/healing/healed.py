"""The report of healing."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from hf_cod.io.report import RunReport, format_number, told_share
from hf_cod.layers.checks import name_of, pruned_matrices
from hf_cod.layers.devices import environment_of
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.size import ModelSize, size_of, size_results
from hf_cod.layers.stack import DecoderLayers
from hf_cod.training.healing.matching import Matching
from hf_cod.training.healing.settings import HealSettings
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.harm import harm_of_training
from hf_cod.training.runs.memory import training_memory
from hf_cod.training.runs.methods import adapter_notes
from hf_cod.training.runs.trainer import Training


def recovered_share(teacher: float, before: float, after: float) -> float | None:
    """Recovered share of the lost log-perplexity: (ln before - ln after) / (ln before - ln teacher).

    Above 1, the student is better than the teacher on this text; below 0, it is worse than before. None if no
    log-perplexity was lost, or if a perplexity is not finite.
    """
    if not all(map(math.isfinite, (teacher, before, after))) or before <= teacher:
        return None
    return math.log(before / after) / math.log(before / teacher)


def healing_report(
    stack: DecoderLayers,
    teacher: DecoderLayers,
    training: Training,
    settings: HealSettings,
    sampling: OwLoreSettings,
    found: dict[str, float],
    layers: dict[str, list[Any]],
    matching: Matching | None,
    name: str | None,
) -> RunReport:
    """The report that `heal` returns; `found` holds the perplexities "teacher", "before" and "after"."""
    tokens = settings.total_steps * settings.batch_size * settings.sequence_length
    share = recovered_share(**found)
    back = "" if share is None else f": {told_share(share, 1)} of the lost log-perplexity is recovered"
    written = {key: format_number(value) for key, value in found.items()}
    summary = [
        f"Perplexity goes from {written['before']} to {written['after']} (teacher {written['teacher']}) on held-out "
        f"samples, after {tokens:,} tokens by {settings.method} (learning rate {settings.rate:g}){back}."
    ]
    sizes = {"teacher": size_of(teacher.model, teacher.layers_path), "healed": size_of(stack.model, stack.layers_path)}
    summary.append(_told_size(sizes, bool(pruned_matrices(stack))))
    if training.memory is not None:
        summary.append(f"A step used {training.memory / 1e9:.2f} GB of memory at its peak, including the teacher.")
    results = {
        "curve": training.curve,
        "perplexity": found,
        **size_results(sizes),
        "recovered_share": share,
        "tokens": tokens,
        "seconds_a_step": training.seconds,
        "training_memory": training_memory(training.memory),
    }
    return RunReport(
        kind="heal",
        model=name or name_of(stack),
        settings={**settings.resolved(), **asdict(sampling)},
        environment=environment_of(stack.model),
        layers=layers,
        results=results,
        summary=summary,
        notes=[
            *choose_modules(stack, sampling).notes("trained"),
            *adapter_notes(settings.method, stack, sampling),
            *harm_of_training(found["before"], found["after"], settings.rate),
            *([] if matching is None else [f"hidden states: layers matched {matching.how}"]),
        ],
    )


def _told_size(sizes: dict[str, ModelSize], zeros: bool) -> str:
    mine, its = sizes["healed"], sizes["teacher"]
    share = mine.layer_weights / its.layer_weights
    told = ", including zeros" if zeros else ""
    return (
        f"The student's layers have {mine.layer_weights:,} weights{told}, {share:.1%} of the teacher's; the student "
        f"takes {mine.bytes / 1e6:,.1f} MB in memory, the teacher {its.bytes / 1e6:,.1f} MB."
    )
