"""Samples with a loss on answers, compared with those of TRL's trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cod.io.answers import answers_of, fill, rows_of
from hf_cod.io.packing import PackedText
from hf_cod.io.records import Record
from tests.io.test_chat import MARKS, ROWS, of_trainer, tokenizer, turns  # noqa: F401 - a fixture
from tests.tiny_tokenizers import gpt_like


def record(prompt, completion, **other):
    return Record(prompt=prompt, completion=completion, **other)


@pytest.mark.parametrize("length", [5, 11, 14, 30])
@pytest.mark.parametrize("row", ["three turns", "prompt"])
def test_truncated_samples_are_those_of_trl(row, length, tokenizer, tmp_path):  # noqa: F811
    """Also those that are left out, because no answer is within the length."""
    tokenizer.chat_template = MARKS
    rows = [ROWS[row], ROWS[row]]
    given_rows = [Record(**({"messages": each["messages"]} if "messages" in each else each)) for each in rows]
    expected = of_trainer(tokenizer, ROWS[row], length, tmp_path)
    if not expected:
        with pytest.raises(
            ValueError, match=f"got 2 records, 0 without an answer, 2 without one in the first {length} t"
        ):
            answers_of(tokenizer, given_rows, length)
        return
    found = answers_of(tokenizer, given_rows, length)
    assert found.samples == expected * 2
    whole = len(answers_of(tokenizer, given_rows, 1000).samples[0][0])
    assert (f"2 of 2 records were truncated to {length} tokens" in found.notes) == (length < whole)


def test_what_is_left_out_is_counted():
    records = [record("one ", "two"), record("one", ""), record("one " * 9, "two"), record("one", "two " * 9)]
    found = answers_of(gpt_like(), records, 6)
    assert [len(ids) for ids, _ in found.samples] == [3, 6]
    assert found.notes == [
        "2 of 4 records were left out: 1 without an answer, 1 without one in the first 6 tokens",
        "2 of 4 records were truncated to 6 tokens",
    ]
    with pytest.raises(
        ValueError, match=r"^text: expected records with answers, got 1 records, 1 without an answer, 0"
    ):
        answers_of(gpt_like(), [Record(turns("one"))], 6)


def test_completions_end_with_the_end_token_once():
    tokenizer = gpt_like()  # noqa: F811
    for end in ("", "<eos>"):
        ((ids, labels),) = answers_of(tokenizer, [record("one ", f"two{end}")], 9).samples
        assert tokenizer.decode(ids) == "one two <eos>" and labels == [-100, *ids[1:]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an end-of-text token behind completions, got none"):
        answers_of(tokenizer, [record("one", "two")], 9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_rows_are_filled_by_best_fit(sizes):
    """As one would write it down."""
    rows = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        left = [9 - sum(sizes[i] for i in row) for row in rows]
        fitting = [space for space in left if space >= sizes[index]]
        if fitting:
            rows[left.index(min(fitting))].append(index)
        else:
            rows.append([index])
    found = fill(sizes, 9)
    assert sorted(i for row in found for i in row) == [*range(len(sizes))]
    assert len(found) == len(rows)
    assert sorted(sum(sizes[i] for i in row) for row in found) == sorted(sum(sizes[i] for i in row) for row in rows)


def test_rows_hold_samples_whose_positions_begin_anew():
    samples = [([5, 6, 7], [5, 6, 7]), ([8, 9], [-100, 9]), ([3, 4, 5, 6], [-100, -100, 5, 6])]
    rows = rows_of(samples, 5, True, gpt_like())
    dataset = PackedText(rows, 4, seed=0)
    assert sorted(len(dataset[i]["input_ids"]) for i in range(2)) == [4, 5]
    batch = rows.collate([rows[rows.bins.index([0, 1])], rows[rows.bins.index([2])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 6, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, -100, 5, 6, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]] and "attention_mask" not in batch
    (first, second) = rows_of(samples, 5, False, gpt_like()).batches(3, 2)
    assert first["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]] and second["input_ids"].shape == (1, 4)
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and first["labels"][1].tolist() == [-100, 9, -100]
    assert torch.equal(dataset[0]["input_ids"], PackedText(rows, 4, seed=0)[0]["input_ids"])
