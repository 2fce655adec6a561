"""Checks of batches before a model runs on them, for mistakes that would cause an IndexError or silent NaN."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.text import IGNORED_LABEL, Batch, check_batches
from hf_cod.layers.checks import embedding_tables, learnt_positions
from hf_cod.layers.decoder_inputs import DECODER_INPUTS, decoder_ids
from hf_cod.layers.devices import check_in_memory
from hf_cod.layers.direct_use import runs_on
from hf_cod.layers.stacks import has_two_towers
from hf_cod.layers.task import CAUSAL_LM_SUFFIXES, LABELS, MASKED_LM_SUFFIXES, task_of

# Inputs that replace a model's main input.
_EMBEDDED = ("inputs_embeds", "encoder_outputs")
_MAIN = ("input_ids", "inputs_embeds")
# Inputs of a tower beside one of text.
_SENSES = ("input_features", "input_values", "pixel_values")
_TENSORS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "decoder_input_ids",
    *LABELS,
)


class InputCheck:
    """Checks batches for one model. The cost is one pass over the token ids of each batch (minimum and maximum).

    Args:
        model: a transformers model without wrappers.
        field: name of the batches in errors.

    Raises:
        ValueError: the model has weights without values (`check_in_memory`).
    """

    def __init__(self, model: nn.Module, field: str = "batches") -> None:
        check_in_memory(model)
        self._field, self._model = field, model
        self._name = type(model).__name__
        self._needed = _needed(model)
        self._tokens, self._width = _embedding_sizes(model)
        self._positions = learnt_positions(model)
        self._two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._makes_own: bool | None = None  # the decoder's tokens, by shifting those of the encoder (BART)

    def check(self, batch: Any, number: int) -> None:
        """Checks that the model can run on a batch.

        Raises:
            ValueError: a batch without the model's inputs, with two of them, without samples or without tokens; values
                that are no dense tensors; tokens or labels outside the vocabulary; more tokens than learned positions;
                a mask of another shape, with NaN, or one that masks a whole sample.
        """
        where = f"of batch {number}"
        check_batches([batch])
        batch = {name: value for name, value in batch.items() if value is not None}
        self._check_names(batch, where)
        for name in (name for name in _TENSORS if name in batch):
            if not isinstance(batch[name], Tensor):
                found = type(batch[name]).__name__
                raise ValueError(f"{self._field}: expected tensors, got {found} as {name!r} {where}; use torch.tensor")
            if batch[name].layout is not torch.strided or batch[name].is_nested or batch[name].is_meta:
                found = "one on the meta device" if batch[name].is_meta else "a sparse or nested one"
                raise ValueError(f"{name}: expected a dense tensor with values, got {found} {where}")
            if not batch[name].numel():
                what = f"{name} {tuple(batch[name].shape)}"
                raise ValueError(f"{self._field}: expected at least one sample and one token, got {what} {where}")
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                self._check_ids(name, batch[name], where, "pixel_values" in batch)
        if "input_ids" in batch:
            self._check_beside(batch, where)
        if "inputs_embeds" in batch and self._width is not None:
            shape = tuple(batch["inputs_embeds"].shape)
            if len(shape) != 3 or shape[-1] != self._width:
                expected = f"(samples, tokens, {self._width})"
                raise ValueError(f"inputs_embeds: expected {expected}, got {shape} {where}")
        if self._two_sides and not any(name in batch for name in DECODER_INPUTS):
            self._check_decoder(batch, where)

    def _check_decoder(self, batch: Batch, where: str) -> None:
        """Checks that the decoder gets tokens: made from labels, or by a model that shifts those of its encoder."""
        if "labels" in batch and (made := decoder_ids(self._model, batch)) is not None:
            self._check_range("labels", made, where)
            return
        if "labels" in batch and task_of(self._model, [batch]) in ("seq2seq_lm", "headless"):
            raise self._missing([DECODER_INPUTS], batch, where)
        if self._makes_own is None:
            self._makes_own = runs_on(self._model, batch)
        if not self._makes_own:
            raise self._missing([DECODER_INPUTS], batch, where)

    def _check_names(self, batch: Batch, where: str) -> None:
        both = [name for name in _MAIN if name in batch]
        if len(both) > 1:
            raise ValueError(f"{self._field}: expected one of {' and '.join(both)}, got both {where}")
        missing = [names for names in self._needed if not any(name in batch for name in names)]
        if missing:
            raise self._missing(missing, batch, where)

    def _missing(self, missing: Sequence[tuple[str, ...]], batch: Batch, where: str) -> ValueError:
        expected = " and ".join(names[0] for names in missing)
        found = ", ".join(map(str, batch)) or "nothing"
        return ValueError(f"{self._field}: expected {expected} for {self._name}, got {found} {where}")

    def _check_ids(self, name: str, ids: Tensor, where: str, with_images: bool) -> None:
        known_shape = ids.dim() == 2 or (ids.dim() > 2 and self._name.endswith("ForMultipleChoice"))
        if ids.dtype is not torch.int64 or not known_shape:  # embeddings accept int32, too, but losses do not
            found = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"{name}: expected whole numbers (samples, tokens), got {found} {where}; use torch.int64")
        if not with_images:  # some models mark images by placeholders outside the vocabulary
            self._check_range(name, ids, where)

    def _check_range(self, name: str, ids: Tensor, where: str) -> None:
        least, most = (int(value) for value in ids.aminmax())
        if self._tokens is not None and (least < 0 or most >= self._tokens):
            wrong = least if least < 0 else most
            known = f"token ids from 0 to {self._tokens - 1} (the embeddings of {self._name})"
            raise ValueError(f"{name}: expected {known}, got {wrong} {where}")

    def _check_beside(self, batch: Batch, where: str) -> None:
        shape, mask = tuple(batch["input_ids"].shape), batch.get("attention_mask")
        if self._positions is not None and "position_ids" not in batch and shape[-1] > self._positions[0]:
            most, table = self._positions
            raise ValueError(
                f"{self._field}: expected at most {most} tokens per sample, the learned positions of {table}, got "
                f"{shape[-1]} {where}"
            )
        if mask is not None and mask.is_floating_point() and bool(mask.isnan().any()):
            raise ValueError(f"attention_mask: expected 0 and 1, got NaN {where}")
        if mask is not None and mask.dim() == 2 == len(shape):
            if tuple(mask.shape) != shape:
                raise ValueError(f"attention_mask: expected {shape}, as input_ids, got {tuple(mask.shape)} {where}")
            empty = (mask != 0).sum(-1) == 0
            if bool(empty.any()):
                sample = int(empty.nonzero()[0])
                raise ValueError(
                    f"attention_mask: expected at least one unmasked token per sample, got none in sample {sample} "
                    f"{where}"
                )
        positions = batch.get("position_ids")
        if positions is not None and positions.shape[-1] != shape[-1]:
            found = tuple(positions.shape)
            raise ValueError(f"position_ids: expected {shape[-1]} per sample, as input_ids has, got {found} {where}")
        if "labels" in batch and self._name.endswith((*CAUSAL_LM_SUFFIXES, *MASKED_LM_SUFFIXES)):
            self._check_labels(batch["labels"], shape, where)

    def _check_labels(self, labels: Tensor, shape: tuple[int, ...], where: str) -> None:
        if self._two_sides:
            return  # the labels are those of the decoder
        if tuple(labels.shape) != shape or labels.is_floating_point():
            found = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels: expected token ids {shape}, as input_ids, got {found} {where}")
        known = labels[labels != IGNORED_LABEL]
        if self._tokens is None or not known.numel():
            return
        least, most = (int(value) for value in known.aminmax())
        if least < 0 or most >= self._tokens:
            wrong = least if least < 0 else most
            raise ValueError(
                f"labels: expected token ids from 0 to {self._tokens - 1}, or {IGNORED_LABEL} for none, got {wrong} "
                f"{where}"
            )


def check_inputs(model: nn.Module, batches: Iterable[Any], field: str = "batches") -> None:
    """Checks that there are batches, and that the model can run on each; see `InputCheck.check`.

    Raises:
        ValueError: the model cannot run on a batch; says on which one and why. Or it has weights without values.
    """
    check_batches(batches)
    if isinstance(batches, Mapping):
        raise ValueError(f"{field}: expected a list of dicts of tensors, got one dict; put it in a list")
    if not isinstance(batches, Sequence):
        batches = list(batches)
    if not len(batches):
        raise ValueError(f"{field}: expected at least one, got none")
    inputs = InputCheck(model, field)
    for number, batch in enumerate(batches):
        inputs.check(batch, number)


def _needed(model: Any) -> list[tuple[str, ...]]:
    """The required inputs of a batch: one name of each tuple."""
    main = getattr(model, "main_input_name", None)
    if main is None:
        return []
    if has_two_towers(model):
        return [("input_ids",), ("pixel_values",)]
    read = tuple(name for name in _SENSES if name in inspect.signature(model.forward).parameters)
    if read and hasattr(model, "get_text_features"):  # a tower of sound or video beside that of text
        return [("input_ids",), read]
    return [(main, *_EMBEDDED)]


def _embedding_sizes(model: Any) -> tuple[int | None, int | None]:
    """Least number and width of a model's token embeddings; None if it has none, or if they are unknown."""
    tables = embedding_tables(model)
    counts, widths = ([getattr(each, name, None) for each in tables] for name in ("num_embeddings", "embedding_dim"))
    return _least(counts), _least(widths)


def _least(numbers: Sequence[Any]) -> int | None:
    return min(numbers) if numbers and all(isinstance(number, int) for number in numbers) else None
