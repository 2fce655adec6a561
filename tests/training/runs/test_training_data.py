"""What a model is trained on: packed rows give each sample the logits that it has alone."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from hf_cod import perplexity
from hf_cod.io.answers import rows_of
from hf_cod.io.records import Record
from hf_cod.training.runs.packed_rows import keeps_apart
from hf_cod.training.runs.training_data import training_data
from hf_cod.training.runs.training_settings import TrainingSettings
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

SAMPLES = [([3, 4, 5, 6], [-100, -100, 5, 6]), ([7, 8, 9], [7, 8, 9]), ([10, 11, 12, 13, 14], [-100, 11, 12, -100, 14])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "olmo2", "gpt2", "mixtral"])
def test_packed_samples_have_the_logits_that_they_have_alone(family):
    model = build(family).eval()
    assert keeps_apart(model, SAMPLES[0][0], SAMPLES[2][0])
    rows = rows_of(SAMPLES, 8, True, gpt_like())
    assert sorted(map(len, rows.bins)) == [1, 2]
    batch = rows.collate([rows[0], rows[1]])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = model(**batch, use_cache=False).loss
        alone = {n: model(input_ids=torch.tensor([ids])).logits[0] for n, (ids, _) in enumerate(SAMPLES)}
    terms = []
    for row, numbers in enumerate(rows.bins):
        start = 0
        for number in numbers:
            ids, labels = SAMPLES[number]
            torch.testing.assert_close(logits[row, start : start + len(ids)], alone[number], atol=1e-5, rtol=1e-4)
            start += len(ids)
            terms.append(cross_entropy(alone[number][:-1], torch.tensor(labels)[1:], reduction="none"))
    terms = torch.cat(terms)
    if family != "mixtral":  # whose loss has a term for balance
        torch.testing.assert_close(loss, terms.sum() / (terms != 0).sum())


def test_a_model_that_does_not_keep_samples_apart_is_found():
    """One whose attention ignores positions, and one without positions."""
    model = build("llama").eval()
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert not keeps_apart(model, SAMPLES[0][0], SAMPLES[2][0])
    config = AutoConfig.for_model("mamba", vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert not keeps_apart(AutoModelForCausalLM.from_config(config), SAMPLES[0][0], SAMPLES[2][0])


def test_records_are_split_packed_and_measured():
    records = [Record(prompt="one two ", completion="three " * (1 + i % 4)) for i in range(12)]
    settings = TrainingSettings(sequence_length=12, eval_samples=3, micro_batch_size=2, batch_size=2)
    model = build("llama")
    data = training_data(model, gpt_like(), iter(records), settings)
    assert sum(map(len, data.windows.bins)) == 9 and len(data.windows) < 9 and data.windows.packed
    assert [len(batch["input_ids"]) for batch in data.held_out] == [2, 1]
    assert data.notes == [
        f"9 records were packed into {len(data.windows)} rows, in which they do not attend to each other"
    ]
    labels = torch.cat([batch["labels"].flatten() for batch in data.held_out])
    assert int((labels != -100).sum()) == sum(1 + i % 4 + 1 for i in (9, 10, 11))
    assert perplexity(model, data.held_out) > 1
    with pytest.raises(
        ValueError, match=r"^text: expected more than the 3 records with answers that are held out, got 2"
    ):
        training_data(model, gpt_like(), records[:2], settings)


def test_a_model_without_packing_pads_and_says_so(monkeypatch):
    monkeypatch.setattr("hf_cod.training.runs.training_data.keeps_apart", lambda *args: False)
    records = [Record(prompt="one ", completion="two")] * 5
    settings = TrainingSettings(sequence_length=12, eval_samples=1, micro_batch_size=2, batch_size=2)
    data = training_data(build("llama"), gpt_like(), records, settings)
    assert len(data.windows) == 4 and not data.windows.packed
    assert data.notes == ["4 records were padded, not packed: in a row, the model does not keep them apart"]
