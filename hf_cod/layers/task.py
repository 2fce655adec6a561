"""The task of a model, and the targets of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_cod.io.text import IGNORED_LABEL, Batch
from hf_cod.layers.decoder_inputs import DECODER_INPUTS, decoder_ids, reads_labels
from hf_cod.layers.stack import unwrap

CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED_LM_SUFFIXES = ("ForMaskedLM",)
CTC_SUFFIX = "ForCTC"
LANGUAGE_MODELS = ("causal_lm", "masked_lm", "seq2seq_lm")  # tasks
# Names of the targets of heads; a question-answering head has a span.
LABELS = ("labels", "start_positions", "end_positions")


def task_of(model: nn.Module, batches: Sequence[Batch] = ()) -> str:
    """The task of a model: "causal_lm", "masked_lm", "seq2seq_lm" (an encoder-decoder that writes), "classes",
    "regression", "multi_label" or "labels" (any other head), "headless", or "unlabelled" for a model that requires
    labels if the batches have none.
    """
    base: Any = unwrap(model)
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and _writes(base):
        return "unlabelled" if any("labels" not in batch for batch in batches) else "seq2seq_lm"
    if name.endswith(CAUSAL_LM_SUFFIXES):
        return "causal_lm"
    if "For" not in name:
        return "causal_lm" if _writes(base) and base.get_output_embeddings() is not None else "headless"
    if any(not set(LABELS) & set(batch) for batch in batches):
        return "unlabelled"
    if name.endswith(MASKED_LM_SUFFIXES):
        return "masked_lm"
    if name.endswith(CTC_SUFFIX):
        return "labels"  # a text, whose characters are at no certain tokens
    labels = batches[0].get("labels") if batches else None
    return "labels" if labels is None else _task_of_labels(base, labels)


def _writes(model: Any) -> bool:
    """Whether transformers generates with a model, as with an encoder-decoder that has an output projection onto its
    vocabulary.
    """
    return callable(getattr(model, "can_generate", None)) and model.can_generate()


def _task_of_labels(base: Any, labels: Tensor) -> str:
    """The task by the rules of transformers' classifiers; "labels" for a head with more outputs than classes."""
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
    """The target token ids, aligned with the logits; IGNORED_LABEL at positions without a target.

    For a causal model position t predicts token t + 1, so the last position predicts nothing, and padding is ignored.
    The decoder's tokens of an encoder-decoder are already shifted, so that position t predicts label t.

    Raises:
        ValueError: a batch of a causal model has neither labels nor token ids.
    """
    if task != "causal_lm" or "labels" in batch:
        labels = batch["labels"]
    else:
        if "input_ids" not in batch:
            raise ValueError(f"batches: expected input_ids or labels for a loss, got {', '.join(map(str, batch))}")
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    if task == "causal_lm":
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return labels


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The inputs of forward: the batch without labels, so that forward computes no loss.

    An encoder-decoder whose decoder gets no tokens reads those that it makes from the labels (`decoder_ids`).
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in LABELS}
    base = unwrap(model)
    made = decoder_ids(base, batch) if reads_labels(base, batch) else None
    return inputs if made is None else {**inputs, DECODER_INPUTS[0]: made}
