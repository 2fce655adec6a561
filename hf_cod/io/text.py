"""Seeded token batches from text (a list, a file or a dataset)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from hf_cod.io.arguments import checked, shown
from hf_cod.io.chat import text_of
from hf_cod.io.inputs import PLAIN_TEXT, check_text_path
from hf_cod.io.records import Record
from hf_cod.io.rows import check_no_nul, read_rows
from hf_cod.io.settings import SampleFields, SampleSettings, TextFields, TextSettings, check_effect, resolve

Batch = Mapping[str, Tensor]
"""Arguments of a model's forward: input_ids (S, T), attention_mask (S, T), labels if the task has labels, ..."""

IGNORED_LABEL = -100  # label of ignored positions in torch and transformers
# A stream is read up to this multiple of the required tokens, so that the samples are chosen and not just the prefix.
STREAM_SURPLUS = 4


def embedded_text() -> str:
    """The opening of Jane Austen's "Persuasion" (1817, public domain), included in the package."""
    return (Path(__file__).parent.parent / "assets" / "persuasion.txt").read_text(encoding="utf-8")


@checked
def load_texts(settings: TextSettings | None = None, **fields: Unpack[TextFields]) -> Iterable[str | Record]:
    """Loads texts from a local file or, with `datasets`, from a dataset; default: the embedded novel.

    Conversations, prompts with completions and instructions are recognized by their columns, and are returned as
    `Record`, which `token_batches` renders by the chat template.

    Args:
        settings: the text source.
        **fields: fields of `TextSettings` as keywords (text, text_column, text_split, text_config, chat_template); they
            override `settings`.

    Raises:
        ValueError: no such file or dataset, an unsupported file type, no such column, or columns of several formats.
        ImportError: the source requires `datasets`, which is not installed.
    """
    settings = resolve(load_texts, TextSettings, settings, fields)
    settings.check_source()
    source = settings.text
    if source is None:
        return [embedded_text()]
    path = Path(source).expanduser()
    check_text_path(source)
    if path.is_file() and path.suffix in PLAIN_TEXT:
        check_effect(settings, ["chat_template"], "plain text")
        check_no_nul(path)
        try:
            return [path.read_text(encoding="utf-8-sig")]  # without a byte order mark, as readers of rows do it
        except UnicodeDecodeError as error:
            raise ValueError(f"text: expected a text file in UTF-8, got {source!r}: {error}") from error
    if (path / "config.json").is_file():
        raise ValueError(f"text: expected a text file or a dataset name, got {source!r}, the directory of a model")
    return read_rows(settings)[0]


def plain_texts(settings: TextSettings) -> Iterator[str]:
    """As `load_texts`, for uses that have no chat template, such as pre-training.

    Raises:
        ValueError: also for records.
    """
    for text in load_texts(settings):
        if isinstance(text, Record):
            raise ValueError("text: expected plain text, got chats; name a column of text (text_column)")
        yield text


@checked
def token_batches(
    tokenizer: Tokenizer,
    texts: Texts,
    settings: SampleSettings | None = None,
    **fields: Unpack[SampleFields],
) -> list[dict[str, Tensor]]:
    """Cuts texts into seeded batches of token ids.

    Packed (the default): the texts are joined and cut into windows of `sequence_length` tokens, including the special
    tokens that the tokenizer adds to a text; `max_samples` windows are sampled without replacement. Unpacked: each
    text is one sample, truncated at `sequence_length` and padded on the right; `max_samples` texts are sampled.

    Args:
        tokenizer: a transformers tokenizer.
        texts: one text, a list, a `datasets` column, or any iterable; a stream is read only as far as needed.
        settings: lengths, counts and seed.
        **fields: fields of `SampleSettings` as keywords (sequence_length, max_samples, batch_size, pack, seed); they
            override `settings`.

    Returns:
        Batches with input_ids and attention_mask, both (S, T) int64.

    Raises:
        ValueError: the texts are shorter than one window, or padding is required and the tokenizer has no padding
            token.
    """
    settings = resolve(token_batches, SampleSettings, settings, fields)
    if isinstance(texts, str) and len(texts) < 256 and Path(texts).is_file():
        raise ValueError(f"texts: expected text, got the name of a file, {texts!r}; pass what the file holds")
    texts = [texts] if isinstance(texts, str) else texts
    samples = _windows(tokenizer, texts, settings) if settings.pack else _single_texts(tokenizer, texts, settings)
    starts = range(0, len(samples), settings.batch_size)
    return [_collate(tokenizer, samples[start : start + settings.batch_size]) for start in starts]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special token ids that the tokenizer adds before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _windows(tokenizer: Any, texts: Iterable[str | Record], settings: SampleSettings) -> list[list[int]]:
    before, behind = _special_tokens(tokenizer)
    width = settings.sequence_length - len(before) - len(behind)
    if width < 1:
        raise ValueError(
            f"sequence_length: expected more than the {len(before) + len(behind)} special tokens, got "
            f"{settings.sequence_length}"
        )
    # A list is read completely; a stream only until there are enough tokens to choose from.
    enough = None if isinstance(texts, Sequence) else STREAM_SURPLUS * settings.max_samples * width
    ids: list[int] = []
    for piece in _tokenized(tokenizer, texts):
        ids += piece
        if enough is not None and len(ids) >= enough:
            break
    count = len(ids) // width
    if count == 0:
        raise ValueError(
            f"texts: expected at least one sample of {settings.sequence_length} tokens, got {len(ids)} tokens in all; "
            "use more text, a shorter sequence length, or one sample per text (--no-pack, in Python pack=False)"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    chosen = sorted(order[: settings.max_samples].tolist())
    return [[*before, *ids[i * width : (i + 1) * width], *behind] for i in chosen]


def _tokenized(tokenizer: Any, texts: Iterable[str | Record]) -> Iterator[list[int]]:
    for text in strings_of(tokenizer, texts):
        if text:
            # verbose=False: a long text is meant to exceed the model's length here, windows are cut afterwards.
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def strings_of(tokenizer: Any, texts: Iterable[Any]) -> Iterator[str]:
    """Texts, and records as their chat template renders them.

    Raises:
        ValueError: one of them is something else, or cannot be rendered.
    """
    for text in texts:
        if isinstance(text, Record):
            text = text_of(tokenizer, text)
        if not isinstance(text, str):
            raise ValueError(f"texts: expected strings, got {type(text).__name__}; pass the column that holds the text")
        yield text


def _single_texts(tokenizer: Any, texts: Iterable[str | Record], settings: SampleSettings) -> list[list[int]]:
    given = texts if isinstance(texts, Sequence) else [*islice(texts, STREAM_SURPLUS * settings.max_samples)]
    # A chat template gives special tokens itself.
    special = not any(isinstance(text, Record) for text in given)
    texts = [text for text in strings_of(tokenizer, given) if text.strip()]
    if not texts:
        raise ValueError("texts: expected at least one text that is not empty, got none")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed))
    chosen = [texts[i] for i in sorted(order[: settings.max_samples].tolist())]
    cut = {"truncation": True, "max_length": settings.sequence_length, "add_special_tokens": special}
    ids: list[list[int]] = tokenizer(chosen, **cut)["input_ids"]
    return ids


def _collate(tokenizer: Any, samples: list[list[int]]) -> dict[str, Tensor]:
    longest = max(len(sample) for sample in samples)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if filler is None:
        if any(len(sample) < longest for sample in samples):
            raise ValueError(
                "tokenizer: expected a padding token for texts of unequal length, got none; set tokenizer.pad_token, "
                "use a batch size of 1, or pack the texts"
            )
        filler = 0
    ids = [sample + [filler] * (longest - len(sample)) for sample in samples]
    mask = [[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that a tokenizer is one, and not its name or the model.

    Raises:
        ValueError: it is something else.
    """
    if not callable(tokenizer) or hasattr(tokenizer, "forward"):
        raise ValueError(
            f"tokenizer: expected a transformers tokenizer, got {shown(tokenizer)}; AutoTokenizer.from_pretrained "
            "loads it"
        )


def check_texts(texts: Any) -> None:
    """Checks that texts are iterable, and not a path.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected strings, got {type(texts).__name__}; read the file and pass its text")


def check_stream(batches: Any) -> None:
    """Checks that batches are iterable; each batch is checked when it is read.

    Raises:
        ValueError: they are something else, such as a single batch.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches: expected a list of dicts of tensors, got one dict; put it in a list")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches: expected a list of dicts of tensors, got {shown(batches)}; hf_cod.token_batches(tokenizer, "
            "texts) makes them from texts"
        )


def check_batches(batches: Any) -> None:
    """Checks that batches are a list of arguments for a model's forward.

    Raises:
        ValueError: a batch is not a dict (names the function that makes batches from texts), or `batches` is an
            iterator, which can be read only once.
    """
    if isinstance(batches, Iterator):
        raise ValueError(f"batches: expected a list, which is read several times, got {type(batches).__name__}")
    check_stream(batches)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batches: expected dicts of tensors for the model's forward, got {type(batch).__name__}; "
                "hf_cod.token_batches(tokenizer, texts) makes them from texts"
            )


# Arguments with these annotations are checked at the call (`io/arguments.py`).
Tokenizer = Annotated[Any, check_tokenizer]
Texts = Annotated[str | Iterable[str | Record], check_texts]
Batches = Annotated[Sequence[Batch], check_batches]
BatchStream = Annotated[Iterable[Batch], check_stream]


@checked
def split_samples(batches: Batches, first: int) -> tuple[list[Batch], list[Batch]]:
    """Splits batches into the first `first` samples and the rest; a batch across the boundary is cut in two."""
    before: list[Batch] = []
    behind: list[Batch] = []
    for batch in batches:
        samples = _count_samples(batch)
        cut = min(max(first, 0), samples)
        if cut:
            before.append({name: _cut(value, slice(cut)) for name, value in batch.items()})
        if cut < samples:
            behind.append({name: _cut(value, slice(cut, None)) for name, value in batch.items()})
        first -= samples
    return before, behind


def _cut(value: Any, rows: slice) -> Any:
    """Values other than tensors (flags) are kept for all samples."""
    return value[rows] if isinstance(value, Tensor) else value


def _count_samples(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def describe_batches(batches: Sequence[Batch]) -> dict[str, int]:
    """Number of samples and, for text, of tokens without padding."""
    found = {"samples": sum(map(_count_samples, batches))}
    if all("input_ids" in batch for batch in batches):
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        found["tokens"] = sum(int(mask.sum()) for mask in masks)
    return found
