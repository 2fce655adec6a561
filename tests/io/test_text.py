import json

import pytest
import torch

from hf_cod.io.text import (
    SampleSettings,
    TextSettings,
    embedded_text,
    load_texts,
    split_samples,
    token_batches,
)
from tests.tiny_tokenizers import bert_like, gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40


def ids_of(batches):
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def test_windows_are_whole_seeded_and_without_padding():
    settings = SampleSettings(sequence_length=16, max_samples=5, batch_size=2, seed=3)
    batches = token_batches(gpt_like(), TEXT, settings)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 16), (2, 16), (1, 16)]
    assert all(b["attention_mask"].all() for b in batches)
    assert ids_of(batches) == ids_of(token_batches(gpt_like(), [TEXT], settings))
    other = SampleSettings(sequence_length=16, max_samples=5, batch_size=2, seed=4)
    assert ids_of(batches) != ids_of(token_batches(gpt_like(), TEXT, other))
    whole = gpt_like()(TEXT)["input_ids"]
    starts = [i for row in ids_of(batches) for i in range(0, len(whole), 16) if whole[i : i + 16] == row]
    assert starts, "windows are consecutive pieces of the text"


def test_special_tokens_stand_around_each_window():
    tokenizer = bert_like()
    for row in ids_of(token_batches(tokenizer, TEXT, SampleSettings(sequence_length=10, max_samples=3))):
        assert row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id and len(row) == 10


def test_single_texts_are_cut_and_padded_on_the_right():
    settings = SampleSettings(sequence_length=6, max_samples=3, batch_size=3, pack=False)
    (batch,) = token_batches(bert_like(), ["one", "one two three", TEXT], settings)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]


def test_a_tokenizer_without_padding_token_uses_its_end_token():
    tokenizer = gpt_like()
    assert tokenizer.pad_token_id is None
    settings = SampleSettings(pack=False, batch_size=2)
    (batch,) = token_batches(tokenizer, ["one two", "one"], settings)
    assert batch["input_ids"][1, 1] == tokenizer.eos_token_id and batch["attention_mask"][1, 1] == 0
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"expected a padding token .* set tokenizer.pad_token"):
        token_batches(tokenizer, ["one two", "one"], settings)
    assert token_batches(tokenizer, ["one two", "two one"], settings)


def test_streams_are_read_only_as_far_as_needed():
    read = []

    def stream():
        for i in range(1000):
            read.append(i)
            yield TEXT

    token_batches(gpt_like(), stream(), SampleSettings(sequence_length=20, max_samples=10))
    assert len(read) < 10


def test_short_text_and_bad_numbers_are_refused():
    with pytest.raises(ValueError, match=r"at least one sample of 64 tokens, got 3 .*--no-pack, in Python pack=False"):
        token_batches(gpt_like(), "one two three", SampleSettings(sequence_length=64))
    with pytest.raises(ValueError, match="not empty"):
        token_batches(gpt_like(), ["", ""], SampleSettings(pack=False))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        SampleSettings(batch_size=0)
    with pytest.raises(ValueError, match="expected more than the 2 special tokens, got 2"):
        token_batches(bert_like(), TEXT, SampleSettings(sequence_length=2))


def test_texts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain words", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in ("x", "y")))
    assert list(load_texts(TextSettings(text=str(tmp_path / "a.txt")))) == ["plain words"]
    (tmp_path / "marked.txt").write_text("plain words", encoding="utf-8-sig")
    assert list(load_texts(TextSettings(text=str(tmp_path / "marked.txt")))) == ["plain words"]
    (tmp_path / "a.tsv").write_text("number\ttext\n1\tx, y\n2\tz\n", encoding="utf-8-sig")
    assert list(load_texts(TextSettings(text=str(tmp_path / "a.tsv")))) == ["x, y", "z"]
    with pytest.raises(ValueError, match=r"texts: expected text, got the name of a file, '.*a\.txt'"):
        token_batches(gpt_like(), str(tmp_path / "a.txt"))
    assert list(load_texts(TextSettings(text=str(tmp_path / "a.jsonl"), text_column="body"))) == ["x", "y"]
    with pytest.raises(ValueError, match=r"text_column: expected .*; got the columns body$"):
        load_texts(TextSettings(text=str(tmp_path / "a.jsonl")))
    (tmp_path / "cut.jsonl").write_text('{"text": "x"}\n{"te')
    with pytest.raises(
        ValueError, match=r"text: expected a text file or a dataset name, got '.*cut\.jsonl': (?!An error occurred).+"
    ):
        load_texts(TextSettings(text=str(tmp_path / "cut.jsonl")))
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="text: expected a text file in UTF-8"):
        load_texts(TextSettings(text=str(tmp_path / "b.txt")))
    with pytest.raises(ValueError, match="text: expected a text file or a dataset name, got 'no/such'"):
        load_texts(TextSettings(text="no/such"))
    (tmp_path / "c.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"text: expected a file that ends in .txt, .* got '.*c.pdf'"):
        load_texts(TextSettings(text=str(tmp_path / "c.pdf")))


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "a/b/c", "~/nowhere.jsonl"])
def test_a_mistyped_path_is_not_looked_up_as_a_data_set(name, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("looked it up"))
    with pytest.raises(ValueError, match="which does not exist"):
        load_texts(TextSettings(text=name))
    assert load_texts(TextSettings()) == [embedded_text()]


def test_samples_are_split_within_a_batch():
    batches = [{"input_ids": torch.arange(6).view(3, 2)}, {"input_ids": torch.arange(6, 10).view(2, 2)}]
    for first in range(6):
        before, behind = split_samples(batches, first)
        rows = [row.tolist() for batch in before for row in batch["input_ids"]]
        assert len(rows) == first
        rows += [row.tolist() for batch in behind for row in batch["input_ids"]]
        assert rows == torch.arange(10).view(5, 2).tolist()
