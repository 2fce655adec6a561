"""Selects a metric by name, module or callable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import nn

from hf_cod.analysis.evaluation.metrics import (
    Accuracy,
    EvaluateModule,
    HeadLoss,
    Metric,
    OutputAngle,
    Perplexity,
    SampleScore,
)
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import SampleFields, SampleSettings
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import find_decoder_layers, unwrap
from hf_cod.layers.stock_four_bit import without_repacking
from hf_cod.layers.task import LANGUAGE_MODELS, model_inputs, task_of

# Task -> its default metric; output_angle for all others.
OWN_METRIC = {
    "causal_lm": "perplexity",
    "masked_lm": "perplexity",
    "seq2seq_lm": "perplexity",
    "classes": "accuracy",
    "regression": "loss",
    "multi_label": "loss",
}


def find_metric(metric: Any, task: str) -> Metric:
    """Returns the metric for a user's setting.

    Args:
        metric: None for the default of the task, see `OWN_METRIC`; "perplexity", "accuracy", "loss" or
            "output_angle"; the name or path of an `evaluate` module, or a loaded one; or a callable
            `metric(outputs, batch)` that returns one score per sample (set its attribute `lower_is_better` if lower
            scores are better).
        task: result of `task_of`.

    Raises:
        ValueError: the model lacks the outputs for this metric, or it cannot be loaded.
        ImportError: the metric needs `evaluate`, which is not installed.
    """
    if metric is None:
        metric = OWN_METRIC.get(task, "output_angle")
    if metric == "output_angle":
        return OutputAngle()
    if hasattr(metric, "rows") and hasattr(metric, "value"):
        return metric
    if task in ("headless", "unlabelled") and (isinstance(metric, str) or not callable(metric)):
        what = "a model without a head" if task == "headless" else "batches without labels"
        raise ValueError(f"metric: expected output_angle or a callable for {what}, got {metric!r}")
    if metric == "perplexity":
        if task not in LANGUAGE_MODELS:
            raise ValueError("metric: expected a language model for perplexity, got a model with another head")
        return Perplexity(task)
    if metric == "accuracy":
        if task not in (*LANGUAGE_MODELS, "classes"):
            raise ValueError("metric: expected class labels for accuracy, got others; pass a callable")
        return Accuracy(task)
    if metric == "loss":
        if task not in ("regression", "multi_label"):
            raise ValueError("metric: expected a regression or multi-label head for loss, got another model")
        return HeadLoss(task)
    if isinstance(metric, str):
        return EvaluateModule(_load_evaluate(metric), task)
    if hasattr(metric, "compute"):
        return EvaluateModule(metric, task)
    if callable(metric):
        return SampleScore(metric)
    raise ValueError(f"metric: expected a name, an evaluate module or a callable, got {metric!r}")


@checked
def perplexity(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[SampleFields],
) -> float:
    """Perplexity of a language model on batches of any device, in its current mode and dtype. Losses are summed in
    float64.

    Args:
        model: a language model of transformers.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        **fields: or fields of `SampleSettings` by name: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: the model is not a language model, or it requires labels and the batches have none.
    """
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    base, device = unwrap(model), execution_device(model)
    metric = find_metric("perplexity", task_of(model, batches))
    check_inputs(base, batches)
    rows = []
    with torch.no_grad(), without_repacking(base):
        for batch in (to_device(batch, device) for batch in batches):
            rows += metric.rows(base(**model_inputs(base, batch)), batch, None)
    return metric.value(rows)


def _load_evaluate(name: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(f"metric: {name!r} requires the evaluate package: pip install 'hf_cod[evaluate]'") from error
    try:
        return evaluate.load(name)
    except Exception as error:
        raise ValueError(
            f"metric: expected perplexity, accuracy, loss, output_angle or an evaluate module, got {name!r}: {error}"
        ) from error


@renamed(path="layers_path")
def held_out_perplexity(model: nn.Module, batches: Sequence[Batch], layers_path: str | None = None) -> float:
    """Perplexity of a language model on batches of any device, in eval mode and without a cache. The model's modes are
    restored.

    Args:
        model: a transformers model.
        batches: dicts for its forward.
        layers_path: the stack's module name, if it cannot be found.
    """
    stack = find_decoder_layers(model, layers_path)
    with evaluation_mode(stack):
        return perplexity(stack.model, batches)
