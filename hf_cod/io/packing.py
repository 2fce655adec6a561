"""Text packed into windows of equal length, in an order that depends on the seed only.

Window i of a run does not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from hf_cod.io.answers import AnswerRows
from hf_cod.io.files import fingerprint, write_aside
from hf_cod.io.journal import Journal
from hf_cod.io.reading import open_tensors
from hf_cod.io.records import Record
from hf_cod.io.text import strings_of

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TEXTS_AT_ONCE = 1000  # texts in one call of the tokenizer, which processes them in parallel
BOOKMARK_EVERY = 8192  # windows


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding (as GPT-2's), trained on `texts`.

    Args:
        texts: the training texts.
        vocabulary: maximum number of entries, including the end-of-text token, which has id 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def token_stream(tokenizer: Any, texts: Iterable[str | Record]) -> Iterator[list[int]]:
    """The token ids of each text, followed by the end-of-text token.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected an end-of-text token between packed texts, got none")
    rest = strings_of(tokenizer, texts)
    while some := list(islice(rest, TEXTS_AT_ONCE)):
        # verbose=False: a long text is meant to exceed the model's length here, windows are cut afterwards.
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def pack(tokenizer: Any, texts: Iterable[str | Record], length: int, most: int | None = None) -> Tensor:
    """All texts, joined and cut into windows; tokens that do not fill the last window are left out.

    Args:
        tokenizer: a transformers tokenizer with an end-of-text token.
        texts: the texts; read only as far as needed for `most` windows.
        length: tokens per window.
        most: maximum number of windows; None: all.

    Returns:
        (windows, length) int32.

    Raises:
        ValueError: the texts do not fill one window.
    """
    ids = chain.from_iterable(token_stream(tokenizer, texts))
    flat = torch.tensor(list(ids if most is None else islice(ids, most * length)), dtype=torch.int32)
    windows = len(flat) // length
    if windows == 0:
        raise ValueError(f"text: expected at least one window of {length} tokens, got {len(flat)} tokens in all")
    return flat[: windows * length].view(windows, length)


def pack_once(file: Path, tokenizer: Any, texts: Iterable[str | Record], length: int) -> Tensor:
    """As `pack`, cached in a safetensors file; if the file exists, it is read instead.

    A damaged file is replaced, with a warning.
    """
    if file.is_file():
        try:
            return _read_windows(file, length)
        except ValueError as error:
            logger.warning("the cached text cannot be read and is written again: %s", error)
    windows = pack(tokenizer, texts, length)
    write_aside(file, lambda out: out.write(save({"windows": windows})))
    return windows


def _read_windows(file: Path, length: int) -> Tensor:
    with open_tensors(file, "windows", "a safetensors file of hf_cod") as found:
        windows: Tensor = found.get_tensor("windows")
    if windows.dtype != torch.int32 or windows.ndim != 2 or len(windows) == 0 or windows.shape[1] != length:
        raise ValueError(
            f"windows: expected windows of {length} tokens in int32, got {tuple(windows.shape)} in {windows.dtype} in "
            f"{str(file)!r}"
        )
    return windows


class PackedText(Dataset[dict[str, Tensor]]):
    """The windows of a full training run, epoch after epoch, each epoch in an order of its own.

    Args:
        windows: (N, T) token ids, or rows of answers.
        length: number of windows in the run.
        seed: seed of the orders.
    """

    def __init__(self, windows: Tensor | AnswerRows, length: int, seed: int) -> None:
        self.windows = windows
        self.length = length
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window `index` of the run as input_ids and labels, both (T,) int64; a row of answers has more."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        epoch, place = divmod(index, len(self.windows))
        if epoch not in self._orders:
            # Seeded with both numbers, so that the second epoch of seed 0 differs from the first epoch of seed 1.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders[epoch] = torch.randperm(len(self.windows), generator=generator)
        window = self.windows[int(self._orders[epoch][place])]
        return _example(window.long()) if isinstance(window, Tensor) else window


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """Windows of a dataset that is tokenized while it is read, in the order of the dataset, repeated without end.

    Bookmarks, written every few thousand windows, store the position in the dataset, so that an interrupted run
    resumes without reading the dataset from its start.

    Args:
        rows: an iterable of rows, usually a streamed dataset. With `state_dict` and `load_state_dict` methods, reading
            resumes at the nearest bookmark; without, it starts at the first row.
        column: the column that holds the text.
        tokenizer: a transformers tokenizer with an end-of-text token.
        length: tokens per window.
        bookmarks: file for the bookmarks; None: they are kept in memory.
        every: windows between bookmarks.

    Raises:
        ValueError: while reading: the rows hold no text.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        tokenizer: Any,
        length: int,
        bookmarks: str | Path | None = None,
        every: int = BOOKMARK_EVERY,
    ) -> None:
        self.rows = rows
        self.column = column
        self.tokenizer = tokenizer
        self.length = length
        self.every = every
        self.journal = Journal(bookmarks, fingerprint("stream", length, column, tokenizer_identity(tokenizer)))
        self.first = 0

    def start_at(self, window: int) -> None:
        """Makes the next iteration start at window `window` of the run."""
        self.first = window

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self.first = self.first, 0  # a later iteration starts at window 0 again
        stateful = hasattr(self.rows, "state_dict")
        start = self.rows.state_dict() if stateful else None
        index, held = self._nearest_bookmark(first)
        marked, empty = index, 0
        while empty < 2:  # one empty pass is allowed: a bookmark may lie at the end of the text
            empty += 1
            for row in self.rows:
                empty = 0
                (ids,) = token_stream(self.tokenizer, [row[self.column]])
                held += ids
                while len(held) >= self.length:
                    window, held = held[: self.length], held[self.length :]
                    if index >= first:
                        yield _example(torch.tensor(window))
                    index += 1
                if index - marked >= self.every and stateful:
                    marked = index
                    if str(index) not in self.journal:
                        self.journal.add(str(index), [self.rows.state_dict(), held])
            if stateful:
                self.rows.load_state_dict(start)
        raise ValueError(f"text: expected rows that can be streamed repeatedly, got none after window {index}")

    def _nearest_bookmark(self, first: int) -> tuple[int, list[int]]:
        places = [int(place) for place in self.journal.entries if place.isdecimal() and int(place) <= first]
        if not places:
            return 0, []
        state, held = self.journal.result(str(max(places)), tuple[dict[str, Any], list[int]])
        self.rows.load_state_dict(state)
        return max(places), list(held)


def tokenizer_identity(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer's class and vocabulary."""
    return fingerprint(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))


def _example(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}  # the model shifts the labels
