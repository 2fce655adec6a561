"""Metrics: perplexity, accuracy, a head's loss, the angle of the output, any `evaluate` module or callable.

A metric converts the model's outputs on a batch to one row per sample (plain numbers and lists, which a journal can
hold), and all rows to one value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_cod.analysis.evaluation.likelihood import negative_log_likelihood
from hf_cod.functional.depth import wide
from hf_cod.io.schema import brief, check_value, limits
from hf_cod.io.text import IGNORED_LABEL, Batch
from hf_cod.layers.task import targets

# `evaluate` does not say whether lower or higher values are better.
LOWER_IS_BETTER = ("mse", "mae", "mape", "smape", "mase", "wer", "cer", "ter", "character", "brier_score")
# Outputs of models of which there is an angle, the first one that a model returns.
MAIN_OUTPUTS = ("last_hidden_state", "logits", "start_logits")
# Nats per token above which the perplexity exceeds the range of floats.
MOST_NATS = math.log(sys.float_info.max)


class Metric(Protocol):
    """The interface of a metric."""

    name: str
    lower_is_better: bool
    compares: bool
    """Whether `rows` uses the intact model's outputs on the same batch."""
    identity: str | None
    """Equal for metrics that compute the same; None if that is unknown, so that nothing is resumed."""

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """One row of plain values for each sample of the batch."""

    def value(self, rows: Sequence[Any]) -> float:
        """The value of the metric for all samples."""


def as_loss(metric: Metric, value: float) -> float:
    """A metric's value as a loss: lower is better, and differences are comparable. For perplexity its logarithm, in
    nats per token, because perplexities without one of the first layers are thousands of times the others.
    """
    if metric.name == "perplexity":
        return math.log(value)
    return value if metric.lower_is_better else -value


def check_rows(metric: Metric, rows: Any, batch: Batch) -> None:
    """Checks that rows from a file can be those of a metric on a batch.

    Raises:
        ValueError: another number of rows than samples, or values that the metric cannot give.
    """
    name = f"rows of {metric.name}"
    check_value(rows, list[Any], name)
    samples = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    if len(rows) != samples:
        raise ValueError(f"{name}: expected {samples}, got {len(rows)}")
    if isinstance(metric, HeadLoss):
        check_value(rows, list[float], name, {"least": 0})
    if isinstance(metric, Perplexity | Accuracy | OutputAngle):
        check_value(rows, list[tuple[float, float]], name, {"least": 0})
        counts: Sequence[int | None] = (
            [None] * samples if isinstance(metric, OutputAngle) else _counts(batch, metric.task)
        )
        most = MOST_NATS if isinstance(metric, Perplexity) else 1
        for number, ((value, count), wanted) in enumerate(zip(rows, counts, strict=True)):
            if count != (count if wanted is None else wanted) or value > count * most:
                raise ValueError(f"{name}[{number}]: expected a sum and a count, got {brief([value, count])}")


def check_loss(metric: Metric, loss: Any) -> None:
    """Checks that a number from a file can be the loss (`as_loss`) of a metric.

    Raises:
        ValueError: it cannot.
    """
    known = {Perplexity: (0, MOST_NATS), HeadLoss: (0, None), Accuracy: (-1, 0), OutputAngle: (0, 1)}
    least, most = known.get(type(metric), (None, None))
    check_value(loss, float, f"loss of {metric.name}", limits(least=least, most=most))


class Perplexity:
    """exp( - 1/N sum_i log p(x_i | x_<i) ) over all N predicted tokens of all samples; for a masked language model over
    its masked tokens, given all others, and for an encoder-decoder over the labels, given the input.
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
            raise ValueError("batches: expected at least one token to predict, got none; give longer samples")
        try:
            return math.exp(loss / tokens)
        except OverflowError:
            return math.inf


class Accuracy:
    """Share of correct predictions: of next tokens, masked tokens or labels."""

    name = "accuracy"
    identity: str | None = name
    lower_is_better = False
    compares = False

    def __init__(self, task: str) -> None:
        self.task = task

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(correct predictions, all predictions)."""
        rows = _predictions(outputs, batch, self.task)
        return [[sum(p == r for p, r in zip(*row, strict=True)), len(row[0])] for row in rows]

    def value(self, rows: Sequence[Any]) -> float:
        """Correct predictions over all, in [0, 1]."""
        right, total = (sum(column) for column in zip(*rows, strict=True))
        return right / total


class HeadLoss:
    """The loss of a regression head (mean squared error) or a multi-label head (binary cross entropy), as in
    transformers' training; mean over samples and outputs.
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
    """Angular distance between the model's output and the intact model's, mean over tokens.

    The output is the final hidden state, or the logits of a model with a head (for a question-answering head those of
    the span's start). Of two towers beside each other it is the final hidden state of the tower that is measured
    (`run_for_metric`). It requires no labels, so it also works for models without a prediction task. 0 for the intact
    model, 0.5 for unrelated outputs.

    The angle of a single number (a reward) is that of its sign. So of a head with one output it is the relative
    difference sum |y - y_intact| / sum (|y| + |y_intact|) over samples: 0 for the intact model, 1 for opposite signs.
    """

    name = "output_angle"
    identity: str | None = name
    lower_is_better = True
    compares = True

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(sum of angles over pi, number of tokens), or of a single number (difference, sum of the sizes)."""
        a, b = wide(_main_output(outputs)), wide(_main_output(intact))
        if a.shape[-1] == 1:
            return torch.stack([(a - b).abs(), a.abs() + b.abs()], -1).flatten(1, -2).sum(1).tolist()
        angle = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() / math.pi  # (S, T), or (S,)
        angle = angle.reshape(len(a), -1)
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        weight = torch.ones_like(angle) if mask is None or mask.shape != angle.shape else mask.to(angle)
        return torch.stack([(angle * weight).sum(-1), weight.sum(-1)], -1).tolist()

    def value(self, rows: Sequence[Any]) -> float:
        """Mean over all tokens, in [0, 1]; 0 if all outputs are 0."""
        angle, tokens = (sum(column) for column in zip(*rows, strict=True))
        return angle / tokens if tokens else 0.0


class EvaluateModule:
    """A metric of the `evaluate` library, computed from arg-max predictions and references."""

    compares = False

    def __init__(self, module: Any, task: str) -> None:
        self.module = module
        self.task = task
        self.name = module.name
        self.lower_is_better = bool(getattr(module, "lower_is_better", module.name in LOWER_IS_BETTER))
        # evaluate loads each script under a module name that contains the hash of its text.
        self.identity: str | None = type(module).__module__

    def rows(self, outputs: Any, batch: Batch, intact: Any) -> list[Any]:
        """(predictions, references), a list each."""
        return _predictions(outputs, batch, self.task)

    def value(self, rows: Sequence[Any]) -> float:
        """The module's result for all predictions; the first one if there are several."""
        predictions = [p for row in rows for p in row[0]]
        references = [r for row in rows for r in row[1]]
        return float(next(iter(self.module.compute(predictions=predictions, references=references).values())))


class SampleScore:
    """A callable `score(outputs, batch)` that returns one number per sample (S,); the value is their mean."""

    compares = False

    def __init__(self, score: Callable[[Any, Batch], Any]) -> None:
        self.score = score
        self.name = getattr(score, "__name__", type(score).__name__)
        self.identity: str | None = None  # code cannot be compared
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


def has_main_output(outputs: Any) -> bool:
    """Whether a model returned a hidden state or logits, of which `OutputAngle` is the angle."""
    return any(name in outputs for name in MAIN_OUTPUTS)


def _main_output(outputs: Any) -> Tensor:
    found: list[Tensor] = [outputs[name] for name in MAIN_OUTPUTS if name in outputs]
    if found:
        return found[0]
    wanted = f"outputs with {', '.join(MAIN_OUTPUTS[:-1])} or {MAIN_OUTPUTS[-1]}"
    raise ValueError(f"metric: expected {wanted}, got {', '.join(outputs)}; pass a function of (outputs, batch)")


def _counts(batch: Batch, task: str) -> list[int]:
    """The number of predictions of each sample."""
    wanted = targets(batch, task) != IGNORED_LABEL
    counts: list[int] = wanted.reshape(len(wanted), -1).sum(-1).tolist()
    return counts


def _predictions(outputs: Any, batch: Batch, task: str) -> list[Any]:
    references = targets(batch, task)
    predicted = outputs.logits.argmax(-1)
    rows = []
    for p, r in zip(predicted.cpu(), references.cpu(), strict=True):
        wanted = r != IGNORED_LABEL
        rows.append([p[wanted].flatten().tolist(), r[wanted].flatten().tolist()])
    return rows
