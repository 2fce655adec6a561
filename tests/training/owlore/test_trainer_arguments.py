"""`owlore`: arguments are checked at the call, and what is not given comes from the trainer's arguments."""

import logging

import pytest
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_cod import LayerScores, OwLoreSettings, owlore
from tests.tiny_models import batch_for, build

EIGHT = LayerScores("other", "owl", [1.0] * 8, [7] * 8)

LOGGER = "hf_cod.training.owlore.trainer_arguments"


class Samples(Dataset):
    def __init__(self, model):
        self.ids = batch_for(model)["input_ids"][0]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": self.ids, "labels": self.ids}


def trained_by(folder, how, **options):
    """The optimizer that Trainer makes with these arguments, at the first of two steps' rate."""
    model = build("llama")
    arguments = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **options
    )
    trainer = Trainer(model, arguments, train_dataset=Samples(model), optimizer_cls_and_kwargs=how)
    trainer.train()
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def rate(optimizer):
    (found,) = {group["initial_lr"] for group in optimizer.param_groups}
    return found


def test_what_is_not_given_is_the_trainers(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        optimizer = trained_by(
            tmp_path,
            owlore(n_active=2, rank=4),
            learning_rate=2e-3,
            weight_decay=0.1,
            adam_beta1=0.8,
            adam_beta2=0.9,
            adam_epsilon=1e-6,
        )
    assert rate(optimizer) == 2e-3 and not caplog.records
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)


def test_what_is_given_is_used_and_a_line_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        optimizer = trained_by(tmp_path, owlore(lr=1e-2, weight_decay=0.0, n_active=2, rank=4), learning_rate=2e-3)
    assert rate(optimizer) == 1e-2
    (record,) = caplog.records
    assert record.message == "lr: owlore's 0.01 is used, not 0.002, the learning_rate of TrainingArguments"


def test_the_same_on_both_sides_is_no_news(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        trained_by(tmp_path, owlore(lr=2e-3, n_active=2, rank=4), learning_rate=2e-3)
    assert not caplog.records


def test_where_neither_is_set_owlores_own_rate_is_used(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        optimizer = trained_by(tmp_path, owlore(n_active=2, rank=4))
    assert rate(optimizer) == 3e-4
    (record,) = caplog.records
    assert record.message.startswith("lr: OwLore's default 0.0003 is used; 5e-05 is only the default")


def test_sft_config(tmp_path):
    import datasets
    import trl

    from tests.tiny_tokenizers import WORDS, gpt_like

    tokenizer = gpt_like()
    options = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False}
    for rates, expected in (({"learning_rate": 7e-4}, 7e-4), ({}, 3e-4)):
        trainer = trl.SFTTrainer(
            build("llama", vocab_size=len(tokenizer)),
            args=trl.SFTConfig(str(tmp_path), disable_tqdm=True, **options, **rates),
            train_dataset=datasets.Dataset.from_dict({"text": [" ".join(WORDS)] * 16}),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=owlore(n_active=1, interval=50, rank=4),
        )
        trainer.train()
        assert rate(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) == expected


def test_outside_of_a_trainer_the_defaults_hold():
    factory, arguments = owlore(n_active=2, rank=4, weight_decay=0.5)
    optimizer = factory()(build("llama"), **arguments)
    assert optimizer.settings == OwLoreSettings(n_active=2, rank=4)
    assert optimizer.param_groups[0]["lr"] == 3e-4 and optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        ({"n_actve": 5}, "owlore: did you mean n_active\\? expected one of .*, got 'n_actve'"),
        ({"learning_rate": 1e-3}, "owlore: expected one of .*, got 'learning_rate'"),
        ({"n_active": 0}, "n_active: expected at least 1, got 0"),
        ({"n_active": 20, "scores": EIGHT}, "n_active: expected between 1 and the 8 layers of the scores, got 20"),
        ({"n_active": "five"}, "n_active: expected an integer, got 'five'"),
        ({"rank": 4.5}, "rank: expected an integer or None, got 4.5"),
        ({"moments": "4bit"}, "moments: did you mean 8bit\\? expected one of float32, 8bit, got '4bit'"),
        ({"lr": "1e-3"}, "lr: expected a number or None, got '1e-3'"),
        ({"lr": -1.0}, "lr: expected at least 0, got -1.0"),
        ({"betas": (0.9, 1.5)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas: expected a list of numbers or None, got 0.9"),
        ({"scores": "scores.json"}, "scores: expected LayerScores, LayerAllocation or None, got 'scores.json'"),
        ({"settings": {"rank": 4}}, "settings: expected OwLoreSettings or None, got dict"),
    ],
)
def test_mistakes_are_told_at_the_call(given, message):
    with pytest.raises(ValueError, match=message):
        owlore(**given)
