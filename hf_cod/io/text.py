"""Text in (a list, a file, a data set), seeded token batches out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from hf_cod.io.arguments import checked, shown
from hf_cod.io.files import looks_local
from hf_cod.io.settings import SampleFields, SampleSettings, TextFields, TextSettings, resolve

Batch = Mapping[str, Tensor]
"""What a model's forward takes: input_ids (S, T), attention_mask (S, T), labels where the task has some, ..."""

# How a data set's reader is called for each ending of a local file; plain text needs no reader.
FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PLAIN_TEXT = (".txt", ".md", ".text", "")
KNOWN_ENDINGS = (*PLAIN_TEXT[:-1], *FILE_READERS)
MASKED_SHARE = 0.15  # BERT (arXiv 1810.04805), section 3.1
IGNORED_LABEL = -100  # transformers' and torch's mark for positions without a label
# A stream is read until it has given this many times the tokens needed, so that windows are a choice, not a prefix.
STREAM_SURPLUS = 4
CHUNK = 1 << 20  # bytes that are looked through at a time


def embedded_text() -> str:
    """The opening of Jane Austen's "Persuasion" (1817, public domain), which the package carries."""
    return (Path(__file__).parent.parent / "assets" / "persuasion.txt").read_text(encoding="utf-8")


@checked
def load_texts(settings: TextSettings | None = None, **fields: Unpack[TextFields]) -> Iterable[str]:
    """Texts from a local file or, by `datasets`, from any data set; the embedded novel if none is named.

    Args:
        settings: which text.
        **fields: or fields of `TextSettings` by name: text, text_column, text_split, text_config.

    Raises:
        ValueError: no such file or data set, a file of another kind, or no such column.
        ImportError: the source needs `datasets`, which is not installed.
    """
    settings = resolve(load_texts, TextSettings, settings, fields)
    settings.check_source()
    source = settings.text
    if source is None:
        return [embedded_text()]
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in (*PLAIN_TEXT, *FILE_READERS):
        raise ValueError(f"text: expected a file that ends in {', '.join(KNOWN_ENDINGS)}, got {source!r}")
    if not path.exists() and (path.suffix in KNOWN_ENDINGS or looks_local(source)):
        raise ValueError(f"text: expected a text file or a data set's name, got {source!r}, which does not exist")
    if path.is_file() and path.suffix in PLAIN_TEXT:
        _check_no_nul(path)
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"text: expected a text file in UTF-8, got {source!r}: {error}") from error
    if (path / "config.json").is_file():
        raise ValueError(f"text: expected a text file or a data set's name, got {source!r}, the directory of a model")
    rows = load_rows(settings)
    return (row[settings.text_column] for row in rows)


def load_rows(settings: TextSettings) -> Any:
    """The rows of a data set, streamed, or of a local file that `datasets` reads.

    Raises:
        ValueError: none named, no such file or data set, or no such column.
        ImportError: `datasets` is not installed.
    """
    source = settings.text
    if source is None:
        raise ValueError("text: expected a data set's name or a file of rows, got none")
    path = Path(source)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"text: reading {source!r} needs the datasets package: pip install 'hf_cod[data]'") from error
    try:
        if path.is_file() and path.suffix in FILE_READERS:
            if path.suffix != ".parquet":
                _check_no_nul(path)
            rows = datasets.load_dataset(FILE_READERS[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, settings.text_config, split=settings.text_split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"text: expected a text file or a data set's name, got {source!r}: {error}") from error
    if rows.column_names is not None and settings.text_column not in rows.column_names:
        raise ValueError(f"text_column: expected one of {', '.join(rows.column_names)}, got {settings.text_column!r}")
    return rows


def _check_no_nul(path: Path) -> None:
    """Makes sure that a text file holds text: readers cut a line short at NUL, or take it for a letter."""
    with path.open("rb") as file:
        for number, chunk in enumerate(iter(lambda: file.read(CHUNK), b"")):
            place = chunk.find(b"\0")
            if place >= 0:
                raise ValueError(
                    f"text: expected text, got a NUL byte at {number * CHUNK + place} in {str(path)!r}, which is a "
                    "binary file or not in UTF-8"
                )


@checked
def token_batches(
    tokenizer: Tokenizer,
    texts: Texts,
    settings: SampleSettings | None = None,
    **fields: Unpack[SampleFields],
) -> list[dict[str, Tensor]]:
    """Cuts texts into seeded batches of token ids.

    Packed (the default), the texts are joined and cut into windows of `sequence_length`, each within the special tokens
    that the tokenizer puts around a text, and `max_samples` of them are drawn without replacement. Unpacked, each text
    is a sample of its own, cut at `sequence_length` and padded on the right; the first `max_samples` of a seeded order.

    Args:
        tokenizer: a transformers tokenizer.
        texts: one text, a list, a `datasets` column, or any iterable; a stream is read only as far as needed.
        settings: lengths, counts and seed.
        **fields: or fields of `SampleSettings` by name: sequence_length, max_samples, batch_size, pack, seed.

    Returns:
        Batches with input_ids and attention_mask, both (S, T) int64.

    Raises:
        ValueError: the texts are shorter than one window, or padding is needed and the tokenizer has no token for it.
    """
    settings = resolve(token_batches, SampleSettings, settings, fields)
    texts = [texts] if isinstance(texts, str) else texts
    samples = _windows(tokenizer, texts, settings) if settings.pack else _single_texts(tokenizer, texts, settings)
    starts = range(0, len(samples), settings.batch_size)
    return [_collate(tokenizer, samples[start : start + settings.batch_size]) for start in starts]


def mask_tokens(tokenizer: Any, batches: Sequence[Batch], seed: int) -> list[dict[str, Tensor]]:
    """Hides a seeded 15 % of each sample's tokens (at least one) behind the mask token; labels hold what was there.

    Special tokens and padding are never hidden. All chosen tokens become the mask token, without BERT's 10 % random
    and 10 % kept ones, which serve training, not measuring.

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: expected a mask token for a masked language model, got none")
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    masked = []
    for batch in batches:
        ids = batch["input_ids"]
        chance = torch.rand(ids.shape, generator=generator)
        chance = chance.masked_fill(torch.isin(ids, special) | (batch["attention_mask"] == 0), torch.inf)
        hidden = (chance < MASKED_SHARE) | (chance == chance.amin(-1, keepdim=True))
        hidden &= chance.isfinite()
        masked.append(
            {
                **batch,
                "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
                "labels": ids.masked_fill(~hidden, IGNORED_LABEL),
            }
        )
    return masked


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _windows(tokenizer: Any, texts: Iterable[str], settings: SampleSettings) -> list[list[int]]:
    before, behind = _special_tokens(tokenizer)
    width = settings.sequence_length - len(before) - len(behind)
    if width < 1:
        raise ValueError(f"sequence_length: expected room beside the special tokens, got {settings.sequence_length}")
    # A list is read whole; a stream only until there is enough to choose from.
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
            "give more text, a shorter sequence length, or take each text as it is (--no-pack, in Python pack=False)"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    chosen = sorted(order[: settings.max_samples].tolist())
    return [[*before, *ids[i * width : (i + 1) * width], *behind] for i in chosen]


def _tokenized(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    for text in _strings(texts):
        if text:
            # verbose=False: a long text is meant to exceed the model's length here, windows are cut afterwards.
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _strings(texts: Iterable[Any]) -> Iterator[str]:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: expected strings, got {type(text).__name__}; pass the column that holds the text")
        yield text


def _single_texts(tokenizer: Any, texts: Iterable[str], settings: SampleSettings) -> list[list[int]]:
    if not isinstance(texts, Sequence):
        texts = islice(texts, STREAM_SURPLUS * settings.max_samples)
    texts = [text for text in _strings(texts) if text.strip()]
    if not texts:
        raise ValueError("texts: expected at least one text that is not empty, got none")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed))
    chosen = [texts[i] for i in sorted(order[: settings.max_samples].tolist())]
    ids: list[list[int]] = tokenizer(chosen, truncation=True, max_length=settings.sequence_length)["input_ids"]
    return ids


def _collate(tokenizer: Any, samples: list[list[int]]) -> dict[str, Tensor]:
    longest = max(len(sample) for sample in samples)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if filler is None:
        if any(len(sample) < longest for sample in samples):
            raise ValueError(
                "tokenizer: expected a padding token for texts of unequal length, got none; set tokenizer.pad_token, "
                "take one sample a batch, or pack"
            )
        filler = 0
    ids = [sample + [filler] * (longest - len(sample)) for sample in samples]
    mask = [[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def check_tokenizer(tokenizer: Any) -> None:
    """Makes sure that a tokenizer is one, and neither its name nor the model.

    Raises:
        ValueError: it is something else.
    """
    if not callable(tokenizer) or hasattr(tokenizer, "forward"):
        raise ValueError(
            f"tokenizer: expected a transformers tokenizer, got {shown(tokenizer)}; AutoTokenizer.from_pretrained "
            "loads it"
        )


def check_texts(texts: Any) -> None:
    """Makes sure that texts can be read one by one, and are no file's name.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected strings, got {type(texts).__name__}; read the file and pass what it holds")


def check_stream(batches: Any) -> None:
    """Makes sure that batches can be read one by one; what they are is checked when they come.

    Raises:
        ValueError: something else, such as one batch.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches: expected a list of dicts of tensors, got one dict; put it in a list")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches: expected a list of dicts of tensors, got {shown(batches)}; of texts, "
            "hf_cod.token_batches(tokenizer, texts) makes them"
        )


def check_batches(batches: Any) -> None:
    """Makes sure that batches are what a model's forward takes, and not the texts themselves.

    Raises:
        ValueError: something else than a dict, which says how batches are made; what can be read only once.
    """
    if isinstance(batches, Iterator):
        raise ValueError(f"batches: expected a list, which is read several times, got {type(batches).__name__}")
    check_stream(batches)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batches: expected dicts of tensors for the model's forward, got {type(batch).__name__}; of texts, "
                "hf_cod.token_batches(tokenizer, texts) makes them"
            )


# Arguments that have these annotations are checked so (`io/arguments.py`).
Tokenizer = Annotated[Any, check_tokenizer]
Texts = Annotated[str | Iterable[str], check_texts]
Batches = Annotated[Sequence[Batch], check_batches]
BatchStream = Annotated[Iterable[Batch], check_stream]


@checked
def split_samples(batches: Batches, first: int) -> tuple[list[Batch], list[Batch]]:
    """The first so many samples, and the rest; the batch between them is cut in two."""
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
    """What is no tensor (a flag) goes with all samples."""
    return value[rows] if isinstance(value, Tensor) else value


def _count_samples(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def describe_batches(batches: Sequence[Batch]) -> dict[str, int]:
    """How many samples and, of text, tokens without padding the batches hold."""
    found = {"samples": sum(map(_count_samples, batches))}
    if all("input_ids" in batch for batch in batches):
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        found["tokens"] = sum(int(mask.sum()) for mask in masks)
    return found
