"""Annealing of the factors of LNS in Trainer, on a model that starts as a stock one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_cod import LnsAnnealing, fold_lns, to_lns
from tests.models.tiny import tiny_model, tokens

ROWS = [{"input_ids": row, "labels": row} for row in tokens(rows=12)]


class Seen(LnsAnnealing):
    """Notes the factor of the last layer before each step."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.factors = []

    def on_step_begin(self, args, state, control, **about):
        self.factors.append(about["model"].model.layers[3].placement.scale)


def trained(model, directory, callback, resume=None, **arguments):
    told = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 0}
    about = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "output_dir": str(directory)}
    trainer = Trainer(
        model, TrainingArguments(**{**told, **about, **arguments}), train_dataset=ROWS, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def start():
    return to_lns(fold_lns(tiny_model("cod_llama", "pre")), exponent=0)


def test_factors_go_from_1_to_those_of_the_paper_and_resume(tmp_path):
    seen = Seen(warmup_steps=4)
    whole = trained(start(), tmp_path / "whole", seen)
    assert seen.factors == pytest.approx([4 ** -(0.5 * min(1, step / 4)) for step in range(6)], abs=1e-12)
    assert whole.config.lns_exponent == 0.5
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    assert half.config.lns_exponent == 0.375 and half.model.layers[3].placement.scale == 4**-0.375
    again = Seen(warmup_steps=4)
    resumed = trained(start(), tmp_path / "whole", again, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.factors == seen.factors[3:]
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_warm_up_is_that_of_the_learning_rate(tmp_path):
    seen = Seen()
    trained(start(), tmp_path, seen, max_steps=4, warmup_steps=2)
    assert seen.factors == pytest.approx([1, 4**-0.25, 0.5, 0.5], abs=1e-12)
    with pytest.raises(
        ValueError, match=r"^warmup_steps: expected a number, or a warm-up of the learning rate, got none"
    ):
        trained(start(), tmp_path, LnsAnnealing(), max_steps=1)


@pytest.mark.parametrize("arguments, field", [({"warmup_steps": 0}, "warmup_steps"), ({"end": 1.5}, "end")])
def test_numbers_out_of_range(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        LnsAnnealing(**arguments)


def test_models_without_lns_are_refused(tmp_path):
    for model, message in (
        (tiny_model("cod_llama", "pre"), "lns_exponent: expected 0.5 with norm_placement='pre', got 0.0"),
        (
            fold_lns(tiny_model("cod_llama", "pre")),
            "model: expected one with LNS, such as of to_lns, got LlamaForCausalLM",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trained(model, tmp_path, LnsAnnealing(2), max_steps=1)
