import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_cod.analysis.monitoring.probe import probe_batches
from hf_cod.io.text import SampleSettings
from tests.tiny_tokenizers import bert_like, gpt_like

SETTINGS = SampleSettings(sequence_length=4, max_samples=3, batch_size=2)
TEXTS = ["one two three four five", "six seven eight nine ten one two three"]


def shapes(batches):
    return [{name: tuple(tensor.shape) for name, tensor in batch.items()} for batch in batches]


@pytest.mark.parametrize(
    "probe",
    [
        TEXTS,
        " ".join(TEXTS),
        iter(TEXTS),
        (text for text in TEXTS),
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"text": TEXTS})["text"],
    ],
    ids=["list", "text", "iterator", "generator", "data set", "column"],
)
def test_texts_in_every_form_give_the_same_batches(probe):
    found = probe_batches(probe, gpt_like(), SETTINGS)
    expected = gpt_like()(" ".join(TEXTS))["input_ids"][:12]
    assert torch.cat([batch["input_ids"] for batch in found]).flatten().tolist() == expected


def test_without_a_probe_the_embedded_novel():
    found = probe_batches(None, bert_like(), SETTINGS)
    assert shapes(found) == [{"input_ids": (n, 4), "attention_mask": (n, 4)} for n in (2, 1)]


def test_tokenized_rows_are_cut_and_padded():
    rows = [{"input_ids": [5] * n, "labels": [5] * n, "other": "x"} for n in (3, 9, 2, 4)]
    first, second = probe_batches(Dataset.from_list(rows), None, SETTINGS)
    assert first["input_ids"].tolist() == [[5, 5, 5, 0], [5, 5, 5, 5]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert second["input_ids"].tolist() == [[5, 5]], "max_samples are taken"
    marked = [{"input_ids": [5, 5, 0], "attention_mask": [1, 1, 0]}]
    assert probe_batches(marked, None, SETTINGS)[0]["attention_mask"].tolist() == [[1, 1, 0]]


def test_batches_are_used_as_they_are():
    batch = {
        "input_ids": torch.ones(2, 7, dtype=torch.long),
        "labels": torch.ones(2, dtype=torch.long),
        "position_ids": None,
    }
    assert shapes(probe_batches([batch] * 5, None, SETTINGS)) == [{"input_ids": (2, 7)}] * 5
    assert shapes(probe_batches(batch, None, SETTINGS)) == [{"input_ids": (2, 7)}]
    loader = DataLoader([{"pixel_values": torch.ones(3, 8, 8)}] * 20, batch_size=2)
    assert shapes(probe_batches(loader, None, SETTINGS)) == [{"pixel_values": (2, 3, 8, 8)}] * 2, (
        "max_samples are enough"
    )


def test_bad_probes():
    with pytest.raises(ValueError, match="probe: expected a tokenizer"):
        probe_batches(TEXTS, None, SETTINGS)
    for wrong, found in (([], "NoneType"), (7, "7"), ([7], "int"), ([{"words": "x"}], "rows with words")):
        with pytest.raises(ValueError, match=f"probe: expected texts.*got {found}"):
            probe_batches(wrong, gpt_like(), SETTINGS)
    with pytest.raises(ValueError, match="texts: expected at least one sample"):
        probe_batches(["one"], gpt_like(), SETTINGS)


ROWS = [{"input_ids": [3, 4, 5]}]
IMAGES = [{"pixel_values": torch.zeros(3, 2, 2), "label": 1}]


@pytest.mark.parametrize(
    "probe, told",
    [
        ([*ROWS, {"text": "one"}], "expected input_ids in each item, as in the first, got text as item 1"),
        ([*ROWS, {"input_ids": None}], "expected input_ids in each item, .* as item 1"),
        ([*ROWS, "one"], "expected input_ids in each item, .* got str as item 1"),
        ([{"input_ids": ["x"]}], "expected numbers in input_ids of item 0, got others"),
        ([*ROWS, {"input_ids": "one"}], "expected numbers in input_ids of item 1, got others"),
        ([*ROWS, {"input_ids": [[3]]}], r"expected one list of tokens .* got input_ids \(1, 1\) .* as item 1"),
        ([*ROWS, {"input_ids": [3, 4], "attention_mask": [1]}], r"mask as long .* attention_mask \(1,\) as item 1"),
        ([{"text": "one"}, {"words": "two"}], "expected text in each item, as in the first, got words as item 1"),
        ([{"input_ids": [[3, 4], [5]]}], "expected numbers in input_ids of item 0"),
        ([{"input_ids": [[3, 4]]}, {"input_ids": [[3], [4, 5]]}], "expected numbers in input_ids of item 1"),
        ([{"input_ids": [[3, 4]]}, 7], "expected dicts of tensors, as in the first, got int as item 1"),
        ([*IMAGES, {"label": 1}], "expected pixel_values in each item, as in the first, got label as item 1"),
        ([*IMAGES, {"pixel_values": torch.zeros(3, 2, 4)}], r"of shape \(3, 2, 2\) in each item, got \(3, 2, 4\)"),
    ],
)
def test_items_unlike_the_first(probe, told):
    with pytest.raises(ValueError, match=f"^probe: .*{told}"):
        probe_batches(probe, gpt_like(), SETTINGS)


class Windows(torch.utils.data.Dataset):
    """Knows its items by number alone, as torch's map-style data sets do."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"input_ids": torch.arange(5) + index, "labels": torch.arange(5)}


def test_a_data_set_of_torch():
    (batch,) = probe_batches(Windows(), None, SampleSettings(sequence_length=4, max_samples=2, batch_size=4))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_tokens_go_before_the_text_that_they_are_of():
    rows = [{"text": "one two", "input_ids": [3, 4, 5]}, {"text": "", "input_ids": []}]
    (batch,) = probe_batches(rows, None, SampleSettings(sequence_length=4, max_samples=2))
    assert batch["input_ids"].tolist() == [[3, 4, 5]]
    with pytest.raises(ValueError, match="probe: expected rows with tokens, got only empty ones"):
        probe_batches(rows[1:], None, SampleSettings())


def test_batches_of_lists_and_with_one_number_a_sample():
    given = [{"input_ids": [[1, 2], [3, 4]], "lengths": torch.tensor([2, 2])}]
    (batch,) = probe_batches(given, None, SampleSettings())
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]] and batch["lengths"].tolist() == [2, 2]


def test_rows_of_images_are_stacked():
    rows = [{"pixel_values": torch.full((3, 2, 2), float(i)), "labels": i} for i in range(5)]
    batches = probe_batches(rows, None, SampleSettings(max_samples=3, batch_size=2))
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(2, 3, 2, 2), (1, 3, 2, 2)]
    (whole,) = probe_batches([{"pixel_values": torch.zeros(4, 3, 2, 2)}], None, SampleSettings())
    assert whole["pixel_values"].shape == (4, 3, 2, 2)
