"""What a run of pre-training found, as a RunReport."""

from __future__ import annotations

from typing import Any

import torch

from hf_cod.diagnostics import diagnose
from hf_cod.evaluation import perplexity
from hf_cod.pretraining.preparation import Prepared, as_batches
from hf_cod.pretraining.recipes import PretrainSettings
from hf_cod.report import RunReport, environment, format_number

DIAGNOSED_SAMPLES = 32  # validation windows that the layers are measured on
MEASURES = ["angular_distance", "block_influence", "output_variance", "layer_drop"]


def training_report(
    settings: PretrainSettings, prepared: Prepared, model: Any, history: list[dict[str, float]]
) -> RunReport:
    """Measures a trained model on the validation text, in float32, and reports the run.

    The report's `layers` are those of `diagnose` (without gradient norms). Its `results` hold `curve` (training loss
    by step), `validation` (validation loss by step, under the run's precision), `tokens`, `parameters`,
    `validation_perplexity`, `validation_tokens`, `effective_depth`, `late_share`, `angular_distance` and `layer_drop`.

    Args:
        settings: the run's.
        prepared: its text.
        model: the trained model.
        history: dicts with step and loss or eval_loss, as the Trainer logs them.
    """
    recipe = settings.recipe
    batches = as_batches(prepared.validation, recipe.micro_batch_size)
    model = model.float()
    value = perplexity(model, batches)
    few = as_batches(torch.utils.data.Subset(prepared.validation, range(_few(prepared))), 8)
    found = diagnose(model, batches=few, metrics=MEASURES, token="all", show_progress=False)
    results = {
        "curve": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "tokens": recipe.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_perplexity": value,
        "validation_tokens": sum(batch["input_ids"].numel() for batch in batches),
        **found.results,
    }
    depth = found.results["effective_depth"]
    summary = [
        f"Validation perplexity {format_number(value)} after {recipe.tokens / 1e6:.3g} million tokens "
        f"(learning rate {recipe.learning_rate:g}).",
        f"Output variance of the last layer {format_number(found.layers['variance'][-1])}; "
        f"effective depth {depth['value']:.1f} of {found.n_layers} layers.",
    ]
    return RunReport(
        kind="pretrain",
        model=f"{settings.preset} {settings.norm_placement}",
        settings=settings.describe(),
        environment=environment("cpu" if not torch.cuda.is_available() else "cuda", torch.float32),
        layers=found.layers,
        results=results,
        summary=summary + found.summary[1:],
    )


def _few(prepared: Prepared) -> int:
    return min(DIAGNOSED_SAMPLES, len(prepared.validation))  # type: ignore[arg-type]
