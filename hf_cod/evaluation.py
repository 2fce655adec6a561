"""How good a model is on batches: perplexity, accuracy, any `evaluate` module or callable.

A metric turns the model's outputs on one batch into one row a sample (plain numbers and lists, so that they can be
written to a journal), and all rows into one figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_cod.calibration import IGNORED_LABEL, Batch
from hf_cod.decoder_layers import unwrap
from hf_cod.functional.depth import wide

CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED_LM_SUFFIXES = ("ForMaskedLM",)
# What heads call that which they are to predict; a question-answering head wants a span.
LABELS = ("labels", "start_positions", "end_positions")
LANGUAGE_MODELS = ("causal_lm", "masked_lm")  # tasks
# Task -> the metric that suits it; output_angle for all others.
OWN_METRIC = {
    "causal_lm": "perplexity",
    "masked_lm": "perplexity",
    "classes": "accuracy",
    "regression": "loss",
    "multi_label": "loss",
}
# `evaluate` does not say which way its metrics go.
LOWER_IS_BETTER = ("mse", "mae", "mape", "smape", "mase", "wer", "cer", "ter", "character", "brier_score")
# Logits that are turned into losses at a time: a chunk and its exponentials stay in the cache.
LOSS_CHUNK = 2**21


class Metric(Protocol):
    """What a layer-drop sweep needs of a metric."""

    name: str
    lower_is_better: bool
    compares: bool
    """Whether `rows` needs the intact model's outputs on the same batch."""
    identity: str | None
    """Equal for metrics that compute the same; None where that cannot be told, so that nothing is resumed."""

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """One row of plain values for each sample of the batch."""

    def value(self, rows: Sequence[Any]) -> float:
        """The figure for all samples."""


def task_of(model: nn.Module, batches: Sequence[Batch] = ()) -> str:
    """What the model can be measured by: "causal_lm", "masked_lm", "classes", "regression", "multi_label" or "labels"
    (any other head), "headless", or "unlabelled" for a model that needs labels where the batches have none.

    Raises:
        ValueError: an encoder-decoder, which would need a target text beside each input.
    """
    base = unwrap(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder or an encoder, got an encoder-decoder "
            f"({type(base).__name__}); its encoder can be measured alone, loaded by AutoModelForTextEncoding"
        )
    name = type(base).__name__
    if name.endswith(CAUSAL_LM_SUFFIXES):
        return "causal_lm"
    if "For" not in name:
        return "headless"
    if any(not set(LABELS) & set(batch) for batch in batches):
        return "unlabelled"
    if name.endswith(MASKED_LM_SUFFIXES):
        return "masked_lm"
    labels = batches[0].get("labels") if batches else None
    return "labels" if labels is None else _task_of_labels(base, labels)


def _task_of_labels(base: Any, labels: Tensor) -> str:
    """As transformers' classifiers decide which loss is theirs; a head of more outputs than classes keeps "labels"."""
    known = {"single_label_classification": "classes", "multi_label_classification": "multi_label"}
    classes, kind = getattr(base.config, "num_labels", 0), getattr(base.config, "problem_type", None)
    if kind is not None:
        return known.get(kind, kind)
    if classes == 1:
        return "regression"
    if not labels.is_floating_point():
        return "classes"
    return "multi_label" if labels.shape[-1] == classes else "labels"


def targets(batch: Batch, task: str) -> Tensor:
    """The token ids that the logits predict, aligned with them; IGNORED_LABEL where nothing is to be predicted.

    For a causal model position t predicts token t + 1, so the last position predicts nothing, and padding is ignored.
    """
    if task != "causal_lm" or "labels" in batch:
        labels = batch["labels"]
    else:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    if task == "causal_lm":
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return labels


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats, 0 where the label is IGNORED_LABEL.

    Computed in float32 or wider, a few rows at a time, so that no second copy of the logits is ever made.

    Args:
        logits: (S, T, V).
        labels: (S, T).

    Returns:
        (S, T).
    """
    flat, flat_labels = logits.flatten(0, -2), labels.flatten()
    high = torch.promote_types(logits.dtype, torch.float32)
    chunk = max(1, LOSS_CHUNK // logits.shape[-1])
    losses = [
        nn.functional.cross_entropy(rows.to(high), wanted, reduction="none", ignore_index=IGNORED_LABEL)
        for rows, wanted in zip(flat.split(chunk), flat_labels.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)


class Perplexity:
    """exp( - 1/N sum_i log p(x_i | x_<i) ) over all N predicted tokens of all samples; for a masked language model over
    its hidden tokens, given all others.
    """

    name = "perplexity"
    identity: str | None = name
    lower_is_better = True
    compares = False

    def __init__(self, task: str) -> None:
        self.task = task

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(sum of negative log likelihoods in nats, number of predicted tokens)."""
        labels = targets(batch, self.task).to(outputs.logits.device)
        loss = wide(negative_log_likelihood(outputs.logits, labels)).sum(-1)
        return torch.stack([loss, (labels != IGNORED_LABEL).sum(-1).to(loss)], -1).tolist()

    def value(self, rows: Sequence[Any]) -> float:
        """Perplexity; infinite where it exceeds the range of floats."""
        loss, tokens = (sum(column) for column in zip(*rows, strict=True))
        if not tokens:
            raise ValueError("expected at least one token to predict, got none; give longer samples")
        try:
            return math.exp(loss / tokens)
        except OverflowError:
            return math.inf


class Accuracy:
    """Share of right predictions: next tokens, hidden tokens or labels."""

    name = "accuracy"
    identity: str | None = name
    lower_is_better = False
    compares = False

    def __init__(self, task: str) -> None:
        self.task = task

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(right predictions, predictions)."""
        rows = _predictions(outputs, batch, self.task)
        return [[sum(p == r for p, r in zip(*row, strict=True)), len(row[0])] for row in rows]

    def value(self, rows: Sequence[Any]) -> float:
        """Right ones over all, in [0, 1]."""
        right, total = (sum(column) for column in zip(*rows, strict=True))
        return right / total


class HeadLoss:
    """The loss of a head that predicts numbers: mean squared error of a regression head, and of a multi-label head the
    binary cross entropy, both as transformers trains them; mean over samples and outputs.
    """

    name = "loss"
    identity: str | None = name
    lower_is_better = True
    compares = False

    def __init__(self, task: str) -> None:
        self.task = task

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """The mean loss of each sample."""
        logits = wide(outputs.logits)
        labels = batch["labels"].to(logits).view_as(logits)
        if self.task == "multi_label":
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        else:
            losses = nn.functional.mse_loss(logits, labels, reduction="none")
        return losses.flatten(1).mean(-1).tolist()

    def value(self, rows: Sequence[Any]) -> float:
        """Mean over samples."""
        return sum(rows) / len(rows)


class OutputAngle:
    """How far the model's output turns from the intact model's: mean angular distance over tokens.

    The output is the final hidden state, or the logits of a model with a head (of a question-answering head those of
    the span's start). It needs no labels, so it serves models where there is nothing to predict. 0 for the intact
    model, 0.5 for unrelated outputs.
    """

    name = "output_angle"
    identity: str | None = name
    lower_is_better = True
    compares = True

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(sum of angles over pi, number of tokens)."""
        a, b = wide(_main_output(outputs)), wide(_main_output(intact))
        angle = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() / math.pi  # (S, T), or (S,)
        angle = angle.reshape(len(a), -1)
        mask = batch.get("attention_mask")
        weight = torch.ones_like(angle) if mask is None or mask.shape != angle.shape else mask.to(angle)
        return torch.stack([(angle * weight).sum(-1), weight.sum(-1)], -1).tolist()

    def value(self, rows: Sequence[Any]) -> float:
        """Mean over all tokens, in [0, 1]."""
        angle, tokens = (sum(column) for column in zip(*rows, strict=True))
        return angle / tokens


class EvaluateModule:
    """A metric of the `evaluate` library, fed with arg-max predictions and references."""

    compares = False

    def __init__(self, module: Any, task: str) -> None:
        self.module = module
        self.task = task
        self.name = module.name
        self.lower_is_better = bool(getattr(module, "lower_is_better", module.name in LOWER_IS_BETTER))
        # evaluate loads each script under a module name that holds the hash of its text.
        self.identity: str | None = type(module).__module__

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(predictions, references), a list each."""
        return _predictions(outputs, batch, self.task)

    def value(self, rows: Sequence[Any]) -> float:
        """What the module computes from all of them; of several figures the first."""
        predictions = [p for row in rows for p in row[0]]
        references = [r for row in rows for r in row[1]]
        return float(next(iter(self.module.compute(predictions=predictions, references=references).values())))


class SampleScore:
    """A callable `score(outputs, batch)` that gives one number a sample (S,); the figure is their mean."""

    compares = False

    def __init__(self, score: Callable[[Any, Batch], Any]) -> None:
        self.score = score
        self.name = getattr(score, "__name__", type(score).__name__)
        self.identity: str | None = None  # code that we cannot compare
        self.lower_is_better = bool(getattr(score, "lower_is_better", False))

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """The score of each sample."""
        scores = torch.as_tensor(self.score(outputs, batch)).flatten()
        samples = len(next(iter(batch.values())))
        if len(scores) != samples:
            raise ValueError(f"metric: expected {samples} scores for {samples} samples, got {len(scores)}")
        return scores.tolist()

    def value(self, rows: Sequence[Any]) -> float:
        """Mean score."""
        return sum(rows) / len(rows)


def find_metric(metric: Any, task: str) -> Metric:
    """The metric that a user means.

    Args:
        metric: None for the task's own, see `OWN_METRIC`; "perplexity", "accuracy", "loss" or
            "output_angle"; the name or path of an `evaluate` module, or one loaded; or a callable
            `metric(outputs, batch)` that returns one score a sample (with an attribute `lower_is_better` if so).
        task: what `task_of` gave.

    Raises:
        ValueError: a metric that this model has no outputs for, or that cannot be loaded.
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
            raise ValueError("metric: perplexity expects a language model, got a model with another head")
        return Perplexity(task)
    if metric == "accuracy":
        if task not in (*LANGUAGE_MODELS, "classes"):
            raise ValueError("metric: accuracy expects labels that are classes, got others; give a callable")
        return Accuracy(task)
    if metric == "loss":
        if task not in ("regression", "multi_label"):
            raise ValueError("metric: loss expects a regression or multi-label head, got another model")
        return HeadLoss(task)
    if isinstance(metric, str):
        return EvaluateModule(_load_evaluate(metric), task)
    if hasattr(metric, "compute"):
        return EvaluateModule(metric, task)
    if callable(metric):
        return SampleScore(metric)
    raise ValueError(f"metric: expected a name, an evaluate module or a callable, got {metric!r}")


def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Perplexity of a language model on batches, in its present mode and dtype; losses are summed in float64.

    Raises:
        ValueError: the model is not a language model.
    """
    task = task_of(model)
    metric = find_metric("perplexity", task)
    base = unwrap(model)
    rows = []
    with torch.no_grad():
        for batch in batches:
            rows += metric.rows(base(**model_inputs(batch)), batch, None)
    return metric.value(rows)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch goes into forward: everything but the labels, so that no loss is computed on the side."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def _main_output(outputs: Any) -> Tensor:
    names = ("last_hidden_state", "logits", "start_logits")
    return next(outputs[name] for name in names if name in outputs)


def _predictions(outputs: Any, batch: Batch, task: str) -> list[Any]:
    references = targets(batch, task)
    predicted = outputs.logits.argmax(-1)
    rows = []
    for p, r in zip(predicted.cpu(), references.cpu(), strict=True):
        wanted = r != IGNORED_LABEL
        rows.append([p[wanted].flatten().tolist(), r[wanted].flatten().tolist()])
    return rows


def _load_evaluate(name: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(f"metric: {name!r} needs the evaluate package: pip install 'hf_cod[evaluate]'") from error
    try:
        return evaluate.load(name)
    except Exception as error:
        raise ValueError(
            f"metric: expected perplexity, accuracy, loss, output_angle or an evaluate module, got {name!r}: {error}"
        ) from error
