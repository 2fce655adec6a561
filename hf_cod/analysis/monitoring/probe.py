"""The fixed batches for measurements during training: from texts, a dataset, or ready batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_cod.io.arguments import shown
from hf_cod.io.settings import SampleSettings
from hf_cod.io.text import Batch, embedded_text, token_batches

TEXT_COLUMN = "text"
EXPECTED = "probe: expected texts, a dataset with a column text or input_ids, or batches of tensors"


def check_probe(probe: Any) -> None:
    """Checks that a probe has items; `probe_batches` checks the items.

    Raises:
        ValueError: it has none.
    """
    items = _items(probe)
    if isinstance(items, (bytes, bytearray)) or not isinstance(items, Iterable):
        raise ValueError(f"{EXPECTED}, got {shown(probe)}")


def probe_batches(probe: Any, tokenizer: Any, settings: SampleSettings) -> list[Batch]:
    """Makes the fixed batches that a model is measured on.

    Args:
        probe: one text or several (cut by `settings`); a dataset with a column "text", or tokenized with "input_ids"
            (its first `max_samples` rows, each cut at `sequence_length`); or batches for the model's forward (all
            batches of a list, up to `max_samples` samples of a data loader). None: the embedded novel.
        tokenizer: required if `probe` is text.
        settings: lengths, counts and seed.

    Raises:
        ValueError: an empty probe, items of another type, rows without tokens, or text without a tokenizer.
    """
    items = _items(probe)
    first = next(iter(items), None) if isinstance(items, Iterable) else None
    if isinstance(items, Iterable) and iter(items) is items:  # the first item of an iterator is consumed
        items = itertools.chain([first], items)
    if isinstance(first, str):
        return _from_texts(items, tokenizer, settings)
    if isinstance(first, Mapping) and "input_ids" in first:
        dimensions = _tensor(first["input_ids"], "input_ids", 0).dim()
        return _whole_batches(items, settings) if dimensions > 1 else _from_rows(items, settings)
    if isinstance(first, Mapping) and TEXT_COLUMN in first:
        return _from_texts((row[TEXT_COLUMN] for _, row in _rows(items, TEXT_COLUMN)), tokenizer, settings)
    if isinstance(first, Mapping) and any(isinstance(v, Tensor) and v.dim() > 1 for v in _inputs(first).values()):
        return _stacked(items, settings) if _is_one_sample(first) else _whole_batches(items, settings)
    if not isinstance(items, Iterable):
        raise ValueError(f"{EXPECTED}, got {shown(probe)}")
    found = f"rows with {', '.join(map(str, first))}" if isinstance(first, Mapping) else type(first).__name__
    raise ValueError(f"{EXPECTED}, got {found}")


def _items(probe: Any) -> Any:
    """An iterable of the probe's items; torch's map-style datasets can only be indexed."""
    if probe is None:
        return [embedded_text()]
    if isinstance(probe, (str, Mapping)):
        return [probe]
    if not isinstance(probe, Iterable) and hasattr(probe, "__getitem__") and hasattr(probe, "__len__"):
        return (probe[i] for i in range(len(probe)))
    return probe


def _is_one_sample(item: Mapping[str, Any]) -> bool:
    """Whether an item without tokens is a row of a dataset, with a single number as its label."""
    labels = [item[name] for name in ("label", "labels") if name in item]
    return any(isinstance(label, (int, float)) or (isinstance(label, Tensor) and label.dim() == 0) for label in labels)


def _rows(items: Iterable[Any], *names: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and content of each item, which must be a row or a batch with these entries."""
    for number, row in enumerate(items):
        missing = [name for name in names if not isinstance(row, Mapping) or row.get(name) is None]
        if missing or not isinstance(row, Mapping):
            found = ", ".join(map(str, row)) or "nothing" if isinstance(row, Mapping) else type(row).__name__
            expected = f"{missing[0]} in each item" if missing else "dicts of tensors"
            raise ValueError(f"probe: expected {expected}, as in the first, got {found} as item {number}")
        yield number, row


def _tensor(value: Any, name: str, number: int) -> Tensor:
    """A tensor of a tensor or of nested lists, as a collator converts them."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"probe: expected numbers in {name} of item {number}, got others: {error}") from error


def _from_texts(texts: Iterable[str], tokenizer: Any, settings: SampleSettings) -> list[Batch]:
    if tokenizer is None:
        raise ValueError(
            "probe: expected a tokenizer (Trainer's processing_class) for texts, or token batches, got texts alone"
        )
    return [*token_batches(tokenizer, texts, settings)]


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass without a loss."""
    return {name: value for name, value in batch.items() if name != "labels" and value is not None}


def _whole_batches(batches: Iterable[Batch], settings: SampleSettings) -> list[Batch]:
    taken: list[Batch] = []
    samples = 0
    for number, batch in _rows(batches):
        inputs = _inputs(batch).items()
        taken.append({name: _tensor(v, name, number) if isinstance(v, list) else v for name, v in inputs})
        counted = next((v for v in taken[-1].values() if isinstance(v, Tensor) and v.dim()), None)
        samples += 1 if counted is None else len(counted)
        if samples >= settings.max_samples and not isinstance(batches, Sequence):
            break
    return taken


def _stacked(rows: Iterable[Mapping[str, Any]], settings: SampleSettings) -> list[Batch]:
    """Stacks rows of tensors of equal shapes, for example images, to batches."""
    chosen = [row for _, row in itertools.islice(_rows(rows), settings.max_samples)]
    names = [name for name, value in _inputs(chosen[0]).items() if isinstance(value, Tensor) and value.dim()]
    parts = [chosen[start : start + settings.batch_size] for start in range(0, len(chosen), settings.batch_size)]
    for number, row in _rows(chosen, *names):
        for name in names:
            expected, found = tuple(chosen[0][name].shape), tuple(_tensor(row[name], name, number).shape)
            if found != expected:
                raise ValueError(
                    f"probe: expected {name} of shape {expected} in each item, got {found} as item {number}"
                )
    return [{name: torch.stack([torch.as_tensor(row[name]) for row in part]) for name in names} for part in parts]


def _from_rows(rows: Iterable[Mapping[str, Any]], settings: SampleSettings) -> list[Batch]:
    width, size = settings.sequence_length, settings.batch_size
    pairs = (_row(row, number) for number, row in _rows(rows, "input_ids"))
    chosen = list(itertools.islice((pair for pair in pairs if len(pair[0])), settings.max_samples))
    if not chosen:
        raise ValueError("probe: expected rows with tokens, got only empty ones")
    ids, masks = ([tensor[:width] for tensor in tensors] for tensors in zip(*chosen, strict=True))
    return [
        {
            "input_ids": pad_sequence(ids[start : start + size], batch_first=True),
            "attention_mask": pad_sequence(masks[start : start + size], batch_first=True),
        }
        for start in range(0, len(ids), size)
    ]


def _row(row: Mapping[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a row."""
    ids = _tensor(row["input_ids"], "input_ids", number)
    given = row.get("attention_mask")
    mask = torch.ones(ids.shape, dtype=torch.long) if given is None else _tensor(given, "attention_mask", number)
    if ids.dim() != 1 or mask.shape != ids.shape:
        found = f"input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}"
        raise ValueError(
            f"probe: expected one list of tokens and a mask as long in each item, got {found} as item {number}"
        )
    return ids, mask
