import logging
import random
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_cod import LayerDiagnosticsCallback, RunReport, TrainingHistory
from hf_cod.cli.main import main
from tests.fresh_processes import run_fresh
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like
from tests.tiny_training import PROBE, rows, run_in_two_processes, silenced, train_by_hand

LEARNING_RATE = 0.05


def trained(folder, callbacks=(), model=None, trainer_class=Trainer, resume=None, **settings):
    """A Trainer that has trained a tiny model; `trainer.seen` holds its batches in order."""
    seen = []

    def collate(samples):
        seen.append(default_data_collator(samples))
        return seen[-1]

    plain = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "no", "learning_rate": LEARNING_RATE}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**plain, **settings})
    model = build("llama", attention_dropout=0.1) if model is None else model
    trainer = trainer_class(model, arguments, train_dataset=rows(), data_collator=collate, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    trainer.seen = seen
    return trainer


def callback(**settings):
    return LayerDiagnosticsCallback(**{"every": 2, "probe": PROBE, **settings})


@pytest.mark.parametrize("probe, shown", [(5, "5"), (b"text", "b'text'"), (object(), "object")])
def test_a_probe_without_items_is_refused_at_the_call(probe, shown):
    with pytest.raises(ValueError, match=f"probe: expected texts, a dataset .*, got {shown}"):
        LayerDiagnosticsCallback(probe=probe)


def history_of(folder):
    return TrainingHistory.load(folder).lines


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class Tracker(TrainerCallback):
    """Keeps what it is given, as TensorBoard's callback and its like do, which Trainer calls before a user's."""

    def __init__(self):
        self.logged = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.setdefault(state.global_step, {}).update(logs)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_is_bit_equal_with_and_without(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "eval_strategy": "no", "max_steps": 5}
    watched = trained(tmp_path / "with", [callback()], **settings)
    alone = trained(tmp_path / "without", **settings)
    assert same_weights(watched.model, alone.model)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (watched, alone)]
    for key, first in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in first.items())
    other = trained(tmp_path / "other", model=build("llama"), **settings)
    assert not same_weights(watched.model, other.model), "dropout was at work"


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1000.0])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_norms_equal_those_of_a_loop_by_hand(tmp_path, accumulation, max_norm):
    trainer = trained(
        tmp_path,
        [callback(every=1)],
        model=build("llama"),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_norm,
        optim="sgd",
        lr_scheduler_type="constant",
        max_steps=4,
    )
    steps = [trainer.seen[i * accumulation : (i + 1) * accumulation] for i in range(4)]
    by_hand = build("llama")
    expected = train_by_hand(by_hand, steps, LEARNING_RATE, max_norm or None)
    lines = history_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, norms in zip(lines, expected, strict=True):
        assert line["gradient_norm"] == pytest.approx(norms, rel=1e-4)
        assert (line["clip_factor"] < 0.5) if max_norm == 0.5 else line["clip_factor"] == 1
    for a, b in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class HalfPrecision(Trainer):
    """fp16=True with its GradScaler, which accelerate offers on GPUs alone."""

    init_scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)


class Overflowing(HalfPrecision):
    init_scale = 2.0**60


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_gradients_scaled_for_half_precision(tmp_path, max_norm, request):
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))  # the next test's is another
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": max_norm, "max_steps": 3}
    watch = callback(every=1)
    trainer = trained(tmp_path / "fp16", [watch], build("llama"), HalfPrecision, **settings)
    expected = train_by_hand(build("llama"), [[batch] for batch in trainer.seen[:3]], LEARNING_RATE, max_norm or None)
    for line, norms in zip(history_of(tmp_path / "fp16"), expected, strict=True):
        assert line["gradient_norm"] == pytest.approx(norms, rel=0.01)
    assert "failure" not in line and watch.monitor.stack[0].mlp.up_proj.weight.dtype == torch.float32
    trained(tmp_path / "skipped", [callback(every=1)], build("llama"), Overflowing, **settings)
    assert [line["gradient_norm"] for line in history_of(tmp_path / "skipped")] == [[None] * 4] * 3


@pytest.mark.process
def test_two_processes(tmp_path):
    run_in_two_processes("ddp", tmp_path)
    seen = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    for rank in (0, 1):
        for name, value in seen[f"with-{rank}"]["weights"].items():
            assert torch.equal(value, seen[f"without-{rank}"]["weights"][name]), name
    both = [seen[f"no dropout-{rank}"]["batches"] for rank in (0, 1)]
    steps = [[batch for batches in both for batch in batches[2 * i : 2 * i + 2]] for i in range(6)]
    by_hand = train_by_hand(build("llama"), steps, LEARNING_RATE, 0.5)
    for line, norms in zip(history_of(tmp_path / "no dropout"), by_hand, strict=True):
        assert line["gradient_norm"] == pytest.approx(norms, rel=1e-4)
        assert line["clip_factor"] < 0.5
    assert [line["step"] for line in history_of(tmp_path / "with")] == [1, 2, 4, 6]
    assert [seen[f"stopped-{rank}"]["steps"] for rank in (0, 1)] == [3, 3], "both stop, or the other waits for ever"


def test_figures_reach_every_tracker_and_the_log_history(tmp_path):
    tracker = Tracker()
    trainer = trained(tmp_path, [tracker, callback(every=3)], logging_steps=2)
    figures = {step: {k: v for k, v in logs.items() if k.startswith("depth/")} for step, logs in tracker.logged.items()}
    assert [step for step, found in figures.items() if found] == [1, 3, 6]
    assert sorted(tracker.logged) == [1, 2, 3, 4, 6]
    names = [f"depth/{m}/layer_{i}" for m in ("gradient_norm", "variance", "angular_distance") for i in range(4)]
    assert set(figures[3]) == {"depth/effective_depth", "depth/late_share", *names}
    assert all(isinstance(value, float) for value in figures[3].values())
    line = history_of(tmp_path)[1]
    assert figures[3]["depth/gradient_norm/layer_2"] == line["gradient_norm"][2]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    for step, found in figures.items():
        assert found.items() <= logged[step].items()
    assert not any(key.startswith("depth/") for key in logged[2]), "an ordinary log is left alone"


def test_history_report_and_pictures(tmp_path, capsys):
    trained(tmp_path / "run", [callback()])
    folder = tmp_path / "run" / "layer_diagnostics"
    report = RunReport.load(folder)
    assert report.kind == "training" and report.results["history"]["step"] == [1, 2, 4, 6]
    pictures = {
        "overview.png",
        *(f"{name}_by_step.png" for name in report.layers if name not in ("max_abs", "added_share")),
    }
    assert pictures <= {path.name for path in folder.iterdir()}
    trained(tmp_path / "other", [callback(output_dir=tmp_path / "here")])
    assert (tmp_path / "here" / "report.md").is_file() and not (tmp_path / "other" / "layer_diagnostics").exists()
    assert main(["history", str(tmp_path / "run"), "--output", str(tmp_path / "drawn")]) == 0
    shown = capsys.readouterr().out
    assert "Effective depth, of 4 layers" in shown
    assert RunReport.load(tmp_path / "drawn").results == report.results
    assert (tmp_path / "drawn" / "overview.png").is_file()
    assert main(["history", str(tmp_path / "run"), "--output", str(tmp_path / "bare"), "--no-plots"]) == 0
    assert not (tmp_path / "bare" / "overview.png").exists()
    assert main(["history", str(tmp_path / "none")]) == 2
    assert "run: expected a training history" in capsys.readouterr().err


def test_texts_are_cut_by_the_trainers_tokenizer(tmp_path):
    class WithTokenizer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, processing_class=gpt_like(), **kwargs)

    words = (text for text in ["one two three four five six seven eight nine ten"] * 9)
    watch = LayerDiagnosticsCallback(every=3, probe=words, sequence_length=8, max_samples=2)
    for name in ("first", "second"):
        trained(tmp_path / name, [watch], trainer_class=WithTokenizer)
        assert watch.monitor.batches[0]["input_ids"].shape == (2, 8)
    assert history_of(tmp_path / "first") == history_of(tmp_path / "second")
    with pytest.raises(ValueError, match="probe: expected a tokenizer"):
        trained(tmp_path, [LayerDiagnosticsCallback()])


class Killed(TrainerCallback):
    """Dies while a step is under way, without a chance to tidy up."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            import os

            os._exit(9)


RECIPE = {
    "max_steps": 12,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.process
def test_a_killed_training_resumes_to_the_same_loss_curve_and_history(tmp_path):
    step = random.Random().choice([6, 7, 8, 10, 11, 12])
    code = (
        "import sys\n"
        f"from {__name__} import *\n"
        "trained(sys.argv[1], [callback(every=3), Killed(int(sys.argv[2]))], **RECIPE)\n"
    )
    died = run_fresh(code, tmp_path / "killed", step)
    assert died.returncode == 9, died.stderr
    resumed = trained(tmp_path / "killed", [callback(every=3)], resume=True, **RECIPE)
    whole = trained(tmp_path / "whole", [callback(every=3)], **RECIPE)
    assert same_weights(resumed.model, whole.model), f"killed in step {step}"
    curves = [
        [(e["step"], e["loss"], e["grad_norm"]) for e in t.state.log_history if "loss" in e] for t in (resumed, whole)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 12
    histories = [tmp_path / name / "layer_diagnostics" / "history.jsonl" for name in ("killed", "whole")]
    assert histories[0].read_bytes() == histories[1].read_bytes()
    assert [line["step"] for line in history_of(tmp_path / "killed")] == [1, 3, 6, 9, 12]


def test_a_dead_layer_is_told_or_stops_the_training(tmp_path, caplog):
    dead = lambda: silenced(build("llama"), 2)  # noqa: E731
    with caplog.at_level(logging.WARNING, "hf_cod.analysis.monitoring.callback"):
        warned = trained(tmp_path / "warn", [callback(every=1)], model=dead())
        stopped = trained(tmp_path / "stop", [callback(every=1, watch="stop")], model=dead())
    assert warned.state.global_step == 6 and stopped.state.global_step == 3
    told = [record.message for record in caplog.records if "layer 2 seems dead" in record.message]
    assert len(told) == 4 and len(set(told)) == 2, "angle and gradient, once in each training"
    assert any("layer 2 seems dead" in note for note in RunReport.load(tmp_path / "stop" / "layer_diagnostics").notes)
    caplog.clear()
    trained(tmp_path / "none", [callback(every=1, watch=None)], model=dead())
    assert not caplog.records


def test_without_trainers_norm_clipped_gradients_are_unknown(tmp_path):
    class Silent(Trainer):
        def log(self, logs, *args, **kwargs):
            logs.pop("grad_norm", None)
            super().log(logs, *args, **kwargs)

    trained(tmp_path / "clipped", [callback()], trainer_class=Silent, max_grad_norm=0.5)
    assert all(line["gradient_norm"] == [None] * 4 for line in history_of(tmp_path / "clipped"))
    trained(tmp_path / "whole", [callback()], trainer_class=Silent, max_grad_norm=0)
    assert all(value > 0 for line in history_of(tmp_path / "whole") for value in line["gradient_norm"])


def test_a_callback_that_vetoes_logs_costs_no_line(tmp_path):
    class Veto(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = False

    trained(tmp_path, [callback(), Veto()], max_grad_norm=0)
    assert [line["step"] for line in history_of(tmp_path)] == [1, 2, 4, 6]


def test_with_sfttrainer(tmp_path):
    tokenizer = gpt_like()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["one two three four five six seven eight nine ten"] * 16
    for name, callbacks in (("with", [LayerDiagnosticsCallback(2, texts, sequence_length=8)]), ("without", [])):
        arguments = trl.SFTConfig(
            str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        model = build("llama", attention_dropout=0.1)
        data = Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
        trainer.train()
        if name == "with":
            watched = trainer
    assert same_weights(watched.model, trainer.model)
    assert [line["step"] for line in history_of(tmp_path / "with")] == [1, 2, 4]
    assert all(value > 0 for value in history_of(tmp_path / "with")[2]["gradient_norm"])
    assert "depth/effective_depth" in watched.state.log_history[0]


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        LayerDiagnosticsCallback(every=0)
    with pytest.raises(ValueError, match="watch: expected 'warn', 'stop' or None, got 'shout'"):
        LayerDiagnosticsCallback(watch="shout")
    unknown = [*PROBE, {"input_ids": torch.full((2, 16), 99)}]
    with pytest.raises(ValueError, match=r"input_ids: expected token ids from 0 to 98 .* got 99 of batch"):
        trained(tmp_path, [callback(probe=unknown)])
    with pytest.raises(ValueError, match="got DeepSpeed"):
        callback().on_train_begin(SimpleNamespace(deepspeed="zero3.json"), None, None)
    trained(tmp_path, [callback()], save_strategy="steps", save_steps=3)
    other = [{"input_ids": PROBE[0]["input_ids"], "attention_mask": torch.ones(6, 16, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"history: expected probe .* resume with the same"):
        trained(tmp_path, [callback(probe=other)], resume=True, max_steps=9)
