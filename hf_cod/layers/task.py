"""What a model can be measured by, and what its outputs are to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_cod.io.text import IGNORED_LABEL, Batch
from hf_cod.layers.stack import unwrap

CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED_LM_SUFFIXES = ("ForMaskedLM",)
LANGUAGE_MODELS = ("causal_lm", "masked_lm")  # tasks
# What heads call that which they are to predict; a question-answering head wants a span.
LABELS = ("labels", "start_positions", "end_positions")


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


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch goes into forward: everything but the labels, so that no loss is computed on the side."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}
