"""Results of a pre-training run: the model, and a RunReport."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM

from hf_cod.analysis.diagnostics.diagnosis import diagnose
from hf_cod.analysis.evaluation.choice import perplexity
from hf_cod.io.loading import load_exactly
from hf_cod.io.report import RunReport, environment, format_number
from hf_cod.layers.size import count_parameters
from hf_cod.training.pretraining.preparation import Prepared, as_batches
from hf_cod.training.pretraining.recipes import PretrainSettings

DIAGNOSED_SAMPLES = 32  # validation windows for the diagnostics of layers
MEASURES = ["angular_distance", "block_influence", "output_variance", "layer_drop"]


def save_results(
    accelerator: Any, model: Any, settings: PretrainSettings, prepared: Prepared, history: list[dict[str, float]]
) -> RunReport | None:
    """Writes the trained model, with the cache enabled for generation, and the report to `settings.output`.

    Must be called on all processes, because shards (FSDP2) are gathered.

    Args:
        accelerator: the Accelerator that prepared the model.
        model: the trained model, wrapped or not.
        settings: settings of the run.
        prepared: text and tokenizer of the run.
        history: see `training_report`.

    Returns:
        The report; None on processes other than the first.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    weights = accelerator.get_state_dict(bare)
    if not accelerator.is_main_process:
        return None
    bare.config.use_cache = True
    if hasattr(bare.config, "output_router_logits"):
        bare.config.output_router_logits = False  # only the load-balancing loss of training uses them
    assert prepared.output is not None
    with ExitStack() as stack:
        output = stack.push(prepared.output)
        bare.save_pretrained(output.results, state_dict=weights)
        prepared.tokenizer.save_pretrained(output.results)
        whole = load_exactly(AutoModelForCausalLM, output.results, dtype=torch.float32).to(accelerator.device)
        report = training_report(settings, prepared, whole, history)
        report.save(output.results)
        output.finish()
    return report


def unigram_perplexity(train: Tensor, validation: Tensor, vocabulary: int) -> float:
    """Perplexity of a unigram model, which predicts each token by its frequency: a baseline.

        exp( -mean_i log p(t_i) ),  p(t) = (n_t + 1) / sum_u (n_u + 1)

    Args:
        train: windows of token ids to count tokens in, (N, T).
        validation: windows to predict, (M, T).
        vocabulary: number of tokens.
    """
    counts = torch.bincount(train.flatten().long(), minlength=vocabulary).double() + 1
    return float((-(counts / counts.sum()).log()[validation[:, 1:].long()]).mean().exp())


def training_report(
    settings: PretrainSettings, prepared: Prepared, model: Any, history: list[dict[str, float]]
) -> RunReport:
    """Measures a trained model on the validation text, in float32, and returns the report of the run.

    The report's `layers` are those of `diagnose` (without gradient norms). Its `results` hold `curve` (training loss
    by step), `validation` (validation loss by step, in the run's precision), `tokens`, `parameters` of "trained",
    `validation_perplexity`, `validation_tokens`, `effective_depth`, `late_share`, `angular_distance` and `layer_drop`.

    Args:
        settings: settings of the run.
        prepared: text and tokenizer of the run.
        model: the trained model.
        history: dicts with step and loss or eval_loss, as Trainer logs them.
    """
    recipe, model = settings.recipe, model.float()
    batches = as_batches(prepared.validation, recipe.micro_batch_size)
    value = perplexity(model, batches)
    results = {
        "curve": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "tokens": recipe.tokens,
        "parameters": {"trained": count_parameters(model)},
        "validation_perplexity": value,
        "validation_tokens": sum(batch["input_ids"].numel() for batch in batches),
    }
    report = RunReport(
        kind="pretrain",
        model=f"{settings.preset} {settings.norm_placement}",
        settings=settings.describe(),
        environment=environment(next(model.parameters()).device, torch.float32),
        layers={},
        results=results,
        summary=[
            f"Validation perplexity {format_number(value)} after {recipe.tokens / 1e6:.3g} million tokens "
            f"(learning rate {recipe.learning_rate:g})."
        ],
    )
    if not math.isfinite(value):
        report.notes.append("the run diverged; layers were not measured")
        return report
    few = as_batches(Subset(prepared.validation, range(min(DIAGNOSED_SAMPLES, len(prepared.validation)))), 8)  # type: ignore[arg-type]
    found = diagnose(model, batches=few, metrics=MEASURES, token="all", show_progress=False)
    report.layers.update(found.layers)
    report.results.update(found.results)
    report.summary.extend(found.summary)
    return report
