import itertools
import json

import datasets
import pytest
import torch
from safetensors.torch import save

from hf_cod.io.packing import PackedStream, PackedText, pack, pack_once, train_tokenizer
from hf_cod.io.rows import load_rows
from hf_cod.io.text import TextSettings, embedded_text
from tests.tiny_tokenizers import WORDS, gpt_like

TEXTS = [" ".join(WORDS[: 1 + i % 10]) for i in range(60)]
LENGTH = 7


def naive(texts, length=LENGTH):
    """All ids in one list, an end-of-text token behind each text, cut from the left."""
    tokenizer, ids = gpt_like(), []
    for text in texts:
        ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def test_pack_joins_texts_and_loses_only_the_tail():
    windows = pack(gpt_like(), iter(TEXTS), LENGTH)
    assert windows.tolist() == naive(TEXTS)
    assert pack(gpt_like(), TEXTS, LENGTH, most=3).tolist() == naive(TEXTS)[:3]
    with pytest.raises(ValueError, match="text: expected at least one window of 99 tokens, got 2 tokens"):
        pack(gpt_like(), ["one"], 99)
    nameless = gpt_like()
    nameless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an end-of-text token"):
        pack(nameless, TEXTS, LENGTH)


def test_pack_once_reads_what_it_wrote(tmp_path):
    file = tmp_path / "windows.safetensors"
    first = pack_once(file, gpt_like(), TEXTS, LENGTH)
    assert torch.equal(first, pack_once(file, gpt_like(), ["not read"], LENGTH))


@pytest.mark.parametrize(
    "damaged", [b"", b"x" * 9, save({"others": torch.ones(1)}), save({"windows": torch.ones(2, LENGTH + 1)})]
)
def test_a_damaged_cache_is_written_again_with_one_warning(damaged, tmp_path, caplog):
    file = tmp_path / "windows.safetensors"
    file.write_bytes(damaged)
    first = pack_once(file, gpt_like(), TEXTS, LENGTH)
    assert first.tolist() == naive(TEXTS) and len(caplog.records) == 1 and str(file) in caplog.text
    assert torch.equal(first, pack_once(file, gpt_like(), ["not read"], LENGTH)) and len(caplog.records) == 1


def test_every_epoch_has_every_window_once_in_an_order_of_its_own():
    windows = pack(gpt_like(), TEXTS, LENGTH)
    n = len(windows)
    run = PackedText(windows, 2 * n + 3, seed=1)
    assert len(run) == 2 * n + 3
    rows = [run[i]["input_ids"].tolist() for i in range(len(run))]
    epochs = rows[:n], rows[n : 2 * n]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(windows.tolist()) and epochs[0] != epochs[1]
    again = PackedText(windows, 2 * n + 3, seed=1)
    assert [again[i]["input_ids"].tolist() for i in reversed(range(len(run)))] == rows[::-1]
    assert [PackedText(windows, n, seed=2)[i]["input_ids"].tolist() for i in range(n)] != epochs[0]
    assert torch.equal(run[0]["labels"], run[0]["input_ids"]) and run[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        run[len(run)]


def taken(stream, count):
    return [window["input_ids"].tolist() for window in itertools.islice(stream, count)]


def rows_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)


@pytest.mark.parametrize("first", [0, 1, 13, 29])
@pytest.mark.parametrize("every", [1, 5, 1000])
def test_a_stream_goes_on_at_any_window(tmp_path, first, every):
    """An interrupted process leaves bookmarks, and a new one goes on with the very next window."""
    bookmarks = tmp_path / "bookmarks.jsonl"
    windows = iter(PackedStream(rows_of(tmp_path), "text", gpt_like(), LENGTH, bookmarks, every))
    for _ in range(first + 1):
        next(windows)
    resumed = PackedStream(rows_of(tmp_path), "text", gpt_like(), LENGTH, bookmarks, every)
    resumed.start_at(first)
    assert taken(resumed, len(naive(TEXTS)) - first) == naive(TEXTS)[first:]


def test_bookmarks_spare_what_was_read(tmp_path):
    bookmarks = tmp_path / "bookmarks.jsonl"
    taken(PackedStream(rows_of(tmp_path), "text", gpt_like(), LENGTH, bookmarks, every=5), len(naive(TEXTS)))
    resumed = PackedStream(rows_of(tmp_path), "text", gpt_like(), LENGTH, bookmarks, every=5)
    resumed.start_at(30)
    read = []
    tokenizer = resumed.tokenizer
    resumed.tokenizer = lambda texts, **options: (read.extend(texts), tokenizer(texts, **options))[1]
    resumed.tokenizer.eos_token_id = tokenizer.eos_token_id
    next(iter(resumed))
    assert 0 < len(read) < 10


def test_a_stream_without_state_is_read_from_its_start():
    stream = PackedStream([{"body": text} for text in TEXTS], "body", gpt_like(), LENGTH)
    stream.start_at(4)
    assert taken(stream, len(naive(TEXTS)) - 4) == naive(TEXTS)[4:]


def test_own_tokenizer_gives_the_text_back():
    text = embedded_text()
    tokenizer = train_tokenizer([text], 512)
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer("naïve → 日本")["input_ids"]) == "naïve → 日本", "bytes know every character"
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2


def test_load_rows_wants_a_name():
    with pytest.raises(ValueError, match="text: expected a dataset name or a file of rows, got none"):
        load_rows(TextSettings())


def test_a_stream_goes_on_from_its_start_and_a_resumed_one_alike(tmp_path):
    """Three passes and more; each beginning in the middle gives the same windows from there on."""
    length = len(naive(TEXTS))
    count = 3 * length + 5
    whole = taken(PackedStream([{"text": text} for text in TEXTS], "text", gpt_like(), LENGTH), count)
    assert whole == naive(TEXTS * 4)[:count]
    for first in (3, length, 3 * length):
        stream = PackedStream(rows_of(tmp_path), "text", gpt_like(), LENGTH, tmp_path / "bookmarks.jsonl", every=9)
        stream.start_at(first)
        assert taken(stream, count - first) == whole[first:], first
        assert taken(stream, 5) == whole[:5]
    with pytest.raises(ValueError, match="expected rows that can be streamed repeatedly, got none after window 0"):
        next(iter(PackedStream([], "text", gpt_like(), LENGTH)))
