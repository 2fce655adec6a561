import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_cod.calibration import SampleSettings
from hf_cod.training.probe import probe_batches
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
    for wrong, found in (([], "NoneType"), (7, "NoneType"), ([7], "int"), ([{"words": "x"}], "rows with words")):
        with pytest.raises(ValueError, match=f"probe: expected texts.*got {found}"):
            probe_batches(wrong, gpt_like(), SETTINGS)
    with pytest.raises(ValueError, match="texts: expected at least one sample"):
        probe_batches(["one"], gpt_like(), SETTINGS)
