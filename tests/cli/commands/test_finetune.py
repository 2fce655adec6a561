"""hf-cod finetune on the embedded LNS model and novel."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    T5Config,
)

from examples.tiny_architectures import build as build_type
from hf_cod import LayerScores, OwlBnbConfig, RunReport, pack_sparse, perplexity, prune, quantize, score_layers
from hf_cod.cli.commands import finetune
from hf_cod.cli.commands.finetune_memory import EstimateSettings
from hf_cod.cli.main import main
from hf_cod.cli.output import finish
from hf_cod.cli.settings import PlotSettings
from hf_cod.cli.sizes import in_gigabytes
from hf_cod.cli.training import checkpoints_in
from hf_cod.io.models import ModelSettings, embedded_model, load_model
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.packing import pack
from hf_cod.io.text import embedded_text
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.estimate import estimate_memory, fill_adapters, take_worst_draw
from hf_cod.training.runs.memory import LiveStorages, gradients_counted, state_of, train_steps
from hf_cod.training.runs.methods import METHODS, set_up
from hf_cod.training.runs.trainer import scores_to_draw_by
from hf_cod.training.runs.training_settings import TrainingSettings
from tests.tiny_models import MIXTURE_TYPES, MIXTURES, build, build_encoder_decoder, build_mixture
from tests.tiny_tokenizers import gpt_like
from tests.tiny_training import dies_in_step_five

ANY = "--steps 10 --batch-size 8 --micro-batch-size 4 --sequence-length 64 --eval-samples 8 --save-every 2"
ANY += " --log-every 2 --dtype float32 --device cpu --no-plots --learning-rate 1e-3"
QUICK = f"{ANY} --n-active 3 --interval 3 --rank 8"
# Method -> the same with its own options alone.
QUICK_OF = {
    **dict.fromkeys(("owlore", "owlore-peft"), QUICK),
    "lisa": f"{ANY} --n-active 3 --interval 3",
    "galore": f"{ANY} --interval 3 --rank 8",
    **dict.fromkeys(("lora", "full"), ANY),
}
MODEL = embedded_model("lns")


def test_what_never_trains_is_told_once(checkpoint, capsys):
    """The estimate of memory prepares the same method again."""
    build("gpt_oss").save_pretrained(checkpoint / "model")
    command = ["finetune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--steps", "2"]
    command += [
        "--method",
        "owlore-peft",
        "--n-active",
        "1",
        "--rank",
        "2",
        "--batch-size",
        "2",
        "--sequence-length",
        "8",
    ]
    assert main([*command, "--eval-samples", "4", "--no-plots", "--output", str(checkpoint / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("of its weights never train") == 1
    told = "24 matrices, 8 of them in banks of experts, with adapters: "
    assert [note.startswith(told) for note in RunReport.load(checkpoint / "out").notes if "adapters" in note] == [
        True,
        False,
    ]
    assert f"note: {told}" in " ".join(shown.out.split())


def test_a_training_that_makes_the_model_worse_says_so(tmp_path, capsys):
    command = ["finetune", MODEL, "--method", "full", *ANY.split(), "--learning-rate", "0.5"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    note = "the training raised the perplexity from "
    assert f"note: {note}" in " ".join(capsys.readouterr().out.split())
    assert [told.startswith(note) for told in RunReport.load(tmp_path / "out").notes] == [True]
    for page in ("README.md", "report.md"):
        assert f"- {note}" in (tmp_path / "out" / page).read_text()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_what_it_saves_loads(method, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["finetune", MODEL, "--method", method, *QUICK_OF[method].split(), "--output", str(output)]) == 0
    assert "Perplexity goes from" in capsys.readouterr().out
    report = RunReport.load(output)
    found = report.results["perplexity"]
    assert found["after"] < found["before"]
    assert [" with adapters: " in note for note in report.notes] == [True] * METHODS[method].adapters
    assert [step for step, _ in report.results["curve"]] == [2, 4, 6, 8, 10]
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    held_out = pack(tokenizer, [embedded_text()], 64)[-8:].long()
    again = perplexity(model, [{"input_ids": part} for part in held_out.split(4)])
    assert again == pytest.approx(found["after"], rel=1e-4)
    memory = report.results["training_memory"]
    used, estimated = memory["used_bytes"], memory["estimate_bytes"]
    assert 0.5 * estimated < used <= 1.05 * estimated  # of the worst draw
    if method in ("full", "galore", "lora"):
        assert used == pytest.approx(estimated, rel=0.05)
    assert (output / "adapter" / "adapter_config.json").is_file() == METHODS[method].adapters
    if method == "owlore-peft":  # three of the ten steps' four draws may meet in a layer: 24 ranks, 16 are kept
        assert 0 <= report.results["lost_energy"]["mean"] <= report.results["lost_energy"]["largest"] < 1
        assert any("cut off" in line for line in report.summary)
    if method in ("owlore", "lisa"):
        assert sum(report.layers["trained"]) == 3 * 10
    report.plot(output)
    assert (output / ("overview.png" if report.layers else "curve.png")).is_file()
    with pytest.raises(ValueError, match="output: expected a new directory"):
        finetune.main([MODEL, "--method", method, *QUICK_OF[method].split(), "--output", str(output)])


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if how.adapters])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_new_adapters_follow_the_seed_alone(family, method, tmp_path):
    """Not what the process drew before; and torch's own generator is left as it was."""

    def drawn(seed, before):
        torch.manual_seed(before)
        model = build(family)
        torch.manual_seed(before)
        expected = torch.get_rng_state()
        trained, _ = METHODS[method].setup(model, None, OwLoreSettings(seed=seed, rank=4), 1e-3, 4)
        assert torch.equal(torch.get_rng_state(), expected)
        trained.save_pretrained(tmp_path)
        return [(tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]

    assert drawn(1, before=5) == drawn(1, before=6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for names in (config["target_modules"], config.get("target_parameters") or ["a", "b"]):
        assert names == sorted(names) and len(names) > 1
    if method == "lora":  # OwLore's adapters begin without a basis
        assert drawn(1, before=5) != drawn(2, before=5)


@pytest.mark.parametrize(
    ("command", "what"),
    [("finetune {} --method lora", "method lora"), ("prune {} --recover-steps 2", "recover_steps")],
)
def test_without_peft_adapters_are_refused_before_a_model_is_loaded(command, what, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(command.format("nowhere").split()) == 2
    expected = f"error: {what}: training adapters requires the peft package: pip install 'hf_cod[recovery]'\n"
    assert capsys.readouterr().err.endswith(expected)


def test_estimates_say_what_fits(capsys, tmp_path):
    """A method that refuses a setting is told of; the others are estimated."""
    command = ["finetune", MODEL, *QUICK.split(), "--estimate", "--output", str(tmp_path / "out")]
    assert main([*command, "--device-memory", "65MB", "--deselected", "keep"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    fits = {row[0]: row[-1] for row in rows if row and row[0] in METHODS}
    assert set(fits) == set(METHODS) - {"owlore-peft"} and fits["lora"] == "yes" and fits["full"] == "no"
    assert "not estimated, owlore-peft: deselected: expected none with an OwLore adapter" in shown
    assert not (tmp_path / "out").exists()


def test_a_training_is_made_to_fit(capsys, tmp_path):
    """The plan is that of the training, which reports it."""
    command = ["finetune", MODEL, *ANY.split(), "--memory", "32MB", "--output", str(tmp_path / "out")]
    assert main([*command, "--plan-only"]) == 0
    (plan,) = [line for line in capsys.readouterr().out.splitlines() if "tokens per forward pass" in line]
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    report = RunReport.load(tmp_path / "out")
    assert report.settings["method"] == "lora" and report.settings["micro_batch_size"] < 4
    assert plan.startswith(f"{report.settings['micro_batch_size']} x 64 tokens") and plan in capsys.readouterr().out
    assert "chosen for 32MB: method lora" in report.notes[0]
    assert report.results["training_memory"]["estimate_bytes"] <= 32e6


def test_no_memory_is_chosen_for_quantized_models(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    quantize(model, OwlBnbConfig(bits=4))
    model.save_pretrained(tmp_path / "small")
    assert main(["finetune", str(tmp_path / "small"), "--memory", "1GB", "--plan-only"]) == 2
    assert "memory: expected a model that is not quantized" in capsys.readouterr().err


def test_small_sizes_are_no_zeros():
    assert [in_gigabytes(size) for size in (16.33e9, 2.5e9, 4.51e6, 0)] == ["16.3", "2.50", "0.0045", "0"]


def test_estimates_count_what_adapters_have_learnt():
    """r = 8 and max_rank = 16 for every layer, beside what the layers in training take."""
    config = AutoConfig.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    shapes = [m.weight.shape for layer in model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    how = {"micro_batch_size": 1, "sequence_length": 8}
    found = estimate_memory(config, "owlore-peft", OwLoreSettings(n_active=1, rank=8), **how)
    whole = estimate_memory(config, "full", OwLoreSettings(), **how)
    learnt = sum(4 * 16 * (m + n) for m, n in shapes)
    assert learnt <= found.weights - whole.weights < 1.3 * learnt


# The numbers of rows of DBRX's experts are values of tensors, which fake tensors do not have.
ESTIMATED = [kind for kind in MIXTURE_TYPES if kind != "dbrx"]
FAST, FAMILIES = ("mixtral", "gpt_oss", "llama4_text"), pytest.mark.families


@pytest.mark.parametrize("family", MIXTURES)
def test_estimates_of_mixtures_of_experts(family):
    """In float32, for which the fake form of their product is not made."""
    found = estimate_memory(
        build(family).config, "owlore", OwLoreSettings(n_active=1, rank=8), micro_batch_size=1, sequence_length=8
    )
    assert found.total > 1.2 * found.weights > 0


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in FAST else FAMILIES) for kind in ESTIMATED])
@pytest.mark.parametrize("method", METHODS)
def test_estimates_of_mixtures_are_those_of_real_tensors(kind, method):
    """The peak of DeepSeek-V3 with OwLore adapters is in the pass that finds their bases."""
    compare_with_real_steps(build_mixture(kind), method, 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_of_a_real_mixture_is_that_of_real_tensors(method, mixture):
    compare_with_real_steps(AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32), method, 0.01)


def compare_with_real_steps(model, method, within):
    """Two steps of the layers with the most weights, on real tensors."""
    how = OwLoreSettings(n_active=2, rank=2 if "owlore" in method else None, floor=1.0)
    found = estimate_memory(model.config, method, how, micro_batch_size=2, sequence_length=32, lora_rank=4)
    trained, optimizer = set_up(method, model, None, how, 0.0, 4)
    fill_adapters(trained)
    take_worst_draw(optimizer)
    ids = torch.randint(3, 99, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    counter = LiveStorages(model.config.vocab_size)
    counter.add([*trained.parameters(), *trained.buffers()], "weights")
    counter.add(batch.values())

    def entered(phase):
        counter.add(state_of(optimizer), "optimizer state")
        counter.phase = phase

    with gradients_counted(trained, counter), counter:
        train_steps(trained, optimizer, batch, steps=2, entered=entered)
    held = counter.memory()
    assert found.total == pytest.approx(held.total, rel=within)
    assert found.optimizer_state == pytest.approx(held.optimizer_state, rel=within)


def test_mixtures_that_cannot_be_estimated_are_named(caplog):
    config = build_mixture("dbrx").config
    with pytest.raises(ValueError, match=r"model: expected a forward pass that does not depend on .* got that of "):
        estimate_memory(config, "full", OwLoreSettings(), micro_batch_size=2, sequence_length=32)
    assert not caplog.records


def test_scores_below_zero_count_as_none_and_given_ones_are_kept(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    scores = score_layers(model, method="weight_norm")
    given = replace(scores, method="layer_drop", values=[-1.0, *scores.values[1:]])
    few = TrainingSettings(score="random")
    windows = torch.zeros(4, 64, dtype=torch.long)
    found = scores_to_draw_by(model, windows, few, None, tmp_path / "found")
    assert LayerScores.load(tmp_path / "found" / "scores.json") == found and min(found.values) >= 0
    file = given.save(tmp_path / "given.json")
    assert scores_to_draw_by(model, windows, few, str(file), tmp_path / "kept") == given
    other = scores.save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"scores: expected the scores that the run in .* started with, got"):
        scores_to_draw_by(model, windows, few, str(other), tmp_path / "kept")


@pytest.mark.parametrize("size, value", [("24GB", 24 * 10**9), ("1.5GiB", 3 * 2**29), ("512m", 512 * 10**6)])
def test_sizes_of_devices(size, value):
    assert EstimateSettings(True, memory=size).bytes_of_device() == value


@pytest.mark.process
def test_a_real_mixture_learns_by_owlore_adapters(mixture, tmp_path, capsys):
    """Its adapters on banks are merged into a stock checkpoint; a step needs no more than estimated."""
    out = tmp_path / "out"
    options = "--steps 6 --batch-size 4 --sequence-length 64 --eval-samples 8 --n-active 3 --interval 3 --rank 8"
    options += " --learning-rate 3e-3 --dtype float32 --device cpu --no-plots"
    assert main(["finetune", mixture, "--method", "owlore-peft", *options.split(), "--output", str(out)]) == 0
    report, shown = RunReport.load(out), capsys.readouterr().out
    assert any("14 of them in banks of experts, with adapters" in note for note in report.notes), shown
    after, before = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, mixture))
    assert type(after) is type(before) and after.state_dict().keys() == before.state_dict().keys()
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert sum(".experts." in name for name in moved) >= 6 and not any("embed" in n or "norm" in n for n in moved)
    perplexities = report.results["perplexity"]
    assert perplexities["after"] < perplexities["before"]
    memory = report.results["training_memory"]  # of the draw with the most weights, and of full adapters
    assert 0.7 * memory["estimate_bytes"] < memory["used_bytes"] <= memory["estimate_bytes"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("finetune") / "whole"
    assert main(["finetune", MODEL, *QUICK.split(), "--output", str(output)]) == 0
    assert not list(output.glob("checkpoint-*"))  # nobody needs them any more
    return output


@pytest.mark.process
def test_a_killed_run_ends_as_one_that_was_not(whole, tmp_path):
    command = ["finetune", MODEL, *QUICK.split(), "--output"]
    dies_in_step_five([*command, str(tmp_path / "killed")])
    assert main([*command, str(tmp_path / "killed")]) == 0
    weights, resumed = (load_file(run / "model.safetensors") for run in (whole, tmp_path / "killed"))
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    reports = [RunReport.load(run) for run in (whole, tmp_path / "killed")]
    assert reports[0].results["curve"] == reports[1].results["curve"] and reports[0].layers == reports[1].layers


def test_an_interrupted_run_saves_the_step_that_it_is_in(whole, ctrl_c, tmp_path, capsys, monkeypatch):
    command = ["finetune", MODEL, *QUICK.split(), "--output"]
    step = OwLoreAdamW.step

    def interrupted(self, *args, **kwargs):
        if self.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(OwLoreAdamW, "step", interrupted)
        assert main([*command, str(tmp_path / "stopped")]) == 130
    assert "the same command resumes from its last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    assert main([*command, str(tmp_path / "stopped")]) == 0
    weights, resumed = (load_file(run / "model.safetensors") for run in (whole, tmp_path / "stopped"))
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    assert not list(tmp_path.glob("*/checkpoint-*"))  # nobody needs them any more


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method", "prefix"], "method"),
        (["--micro-batch-size", "3"], "micro_batch_size: expected batch_size 8 to be a multiple of it, got 3"),
        (["--eval-samples", "99999"], "text: expected more than the 99999 windows of 64 tokens that are held out"),
        (["--n-active", "13"], "n_active: expected between 1 and the 12 layers of the scores, got 13"),
        (["--memory", "much"], "memory: expected a size such as 24GB or 80GiB, got 'much'"),
        (["--log-every", "0"], "log_every: expected at least 1, got 0"),
        (["--learning-rate", "-1"], "learning_rate: expected a number above 0, got -1"),
        (["--max-grad-norm", "-1"], "max_grad_norm: expected a number of at least 0, got -1"),
        (["--fused"], "fused: expected micro_batch_size equal to batch_size, 8, got 4"),
        (["--fused", "--micro-batch-size", "8"], "fused: expected max_grad_norm 0, got 1"),
        (["--method", "lora", "--scores", __file__], "scores: expected none with lora, which does not sample layers"),
        (["--rank", "999"], "rank: expected at most 128, the width of the layers' matrices, got 999"),
    ],
)
def test_bad_input(more, message, tmp_path, capsys):
    try:
        status = main(["finetune", MODEL, *QUICK.split(), *more, "--output", str(tmp_path / "out")])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: build_encoder_decoder("t5"), "T5ForConditionalGeneration, an encoder-decoder"),
        (lambda: build("bert"), "BertForMaskedLM, a masked language model"),
        (lambda: build("bert_headless"), "BertModel, without a head"),
        (lambda: build("vit"), "ViTForImageClassification, which reads pixel_values"),
    ],
)
def test_what_does_not_continue_text_is_named_with_what_trains_it(make, kind, checkpoint, capsys):
    model, output = checkpoint / "other", checkpoint / "out"
    make().save_pretrained(model)
    gpt_like().save_pretrained(model)
    capsys.readouterr()
    assert main(["finetune", str(model), *QUICK.split(), "--output", str(output)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "warning:" in line]
    assert len(told) == 1 and kind in told[0] and "use hf_cod.owlore with Trainer" in told[0]
    assert not (output / "report.json").exists()
    for options in (["--estimate"], ["--plan-only", "--memory", "1GB"]):  # BERT also has a causal class
        assert main(["finetune", str(model), *options]) == 2
        shown = capsys.readouterr()
        assert kind.partition(",")[0] in shown.err and "use hf_cod.owlore with Trainer" in shown.err
        assert "total" not in shown.out


@pytest.mark.parametrize("method", ["lora", "owlore-peft"])
def test_an_adapter_on_an_adapter_is_not_saved_without_it(method, checkpoint, capsys):
    """Its file would name the base of the first one."""
    torch.manual_seed(0)
    base, input = checkpoint / "model", checkpoint / "input"
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2))
    torch.nn.init.normal_(first.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    first.save_pretrained(input)
    merged = first.merge_and_unload()
    command = f"finetune {input} --text {checkpoint / 'text.txt'} --steps 1 --batch-size 2 --sequence-length 8"
    more = ["--rank", "2", "--n-active", "1"] if method == "owlore-peft" else []
    command = [*command.split(), "--method", method, "--eval-samples", "4", "--no-plots", *more]
    assert main([*command, "--learning-rate", "1e-12", "--output", str(checkpoint / "out")]) == 0
    ids = torch.arange(3, 12)[None]
    again = AutoModelForCausalLM.from_pretrained(checkpoint / "out")
    torch.testing.assert_close(again(ids).logits, merged(ids).logits)
    assert not [*(checkpoint / "out").rglob("adapter_config.json")]
    notes = RunReport.load(checkpoint / "out").notes
    assert any(note.startswith("the adapter is part of the model alone") for note in notes)


@pytest.mark.parametrize("command", ["finetune --method lora", "finetune --method owlore-peft --rank 4", "quantize"])
def test_shared_weights_are_refused_before_any_work(command, checkpoint, capsys):
    build_type("zamba2").save_pretrained(checkpoint / "other")
    gpt_like().save_pretrained(checkpoint / "other")
    first, *options = command.split()
    capsys.readouterr()
    assert main([first, str(checkpoint / "other"), *options, "--output", str(checkpoint / "out")]) == 2
    shown = capsys.readouterr()
    assert "model: expected a separate weight for each matrix" in " ".join(shown.err.split())
    assert not any(word in shown.out + shown.err for word in ("perplexity", "comparison", "training for"))


def test_a_model_of_text_and_images_is_estimated_whole():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 99, **sizes},
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **sizes},
        image_token_id=5,
    )
    how = {"micro_batch_size": 2, "sequence_length": 16}
    found = estimate_memory(config, "full", OwLoreSettings(), **how)
    weights = sum(p.nbytes for p in AutoModelForImageTextToText.from_config(config).parameters())
    assert found.weights == pytest.approx(weights, rel=0.01)
    with pytest.raises(ValueError, match="model: expected a causal language model, got the type 't5'"):
        estimate_memory(T5Config(), "full", OwLoreSettings(), **how)


def test_a_training_whose_memory_cannot_be_estimated_goes_on(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise NotImplementedError  # without a word, as a bare assertion in a model

    monkeypatch.setattr(finetune, "estimate", fails)
    more = ["--method", "full", "--steps", "1", "--save-every", "2", "--eval-samples", "1"]
    assert main(["finetune", MODEL, *ANY.split(), *more, "--output", str(tmp_path / "out")]) == 0
    assert "there was no estimate" in " ".join(capsys.readouterr().out.split())


def test_a_training_that_ends_in_nan_writes_no_model(tmp_path, capsys):
    more = ["--method", "full", "--steps", "4", "--learning-rate", "1e30", "--eval-samples", "1"]
    assert main(["finetune", MODEL, *ANY.split(), *more, "--output", str(tmp_path / "out")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "weights: expected finite numbers after training, got NaN" in line and "lower --learning-rate" in line
    assert not [*(tmp_path / "out").glob("*.safetensors")]


def test_a_training_that_fails_while_it_is_counted_leaves_nothing_behind(tmp_path, monkeypatch):
    step, done = OwLoreAdamW.step, []

    def fails(self, *args, **kwargs):
        done.append(0)
        if len(done) == 2:  # the step whose memory is counted
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(OwLoreAdamW, "step", fails)
    command = ["finetune", MODEL, *QUICK.split(), "--output", str(tmp_path / "out")]
    assert main(command) == 130
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_directory_of_another_run_is_refused(tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    command = ["finetune", MODEL, *QUICK.split(), "--output", str(output)]
    assert main([*command, "--eval-samples", "99999"]) == 2
    assert "text: expected more than the 99999" in capsys.readouterr().err and not output.exists()

    def fails(*_):
        raise RuntimeError("no power")

    monkeypatch.setattr(OwLoreAdamW, "step", fails)
    assert main([*command, "--steps", "12"]) == 1
    assert main([*command, "--steps", "11"]) == 1
    assert "no power" in capsys.readouterr().err, "a run without a checkpoint is replaced"
    (output / "checkpoint-2").mkdir()
    assert main([*command, "--steps", "12"]) == 2
    assert "steps: expected 11, as in the run in" in capsys.readouterr().err
    (output / "checkpoint-2-kept").mkdir()
    assert main([*command, "--steps", "11"]) == 2
    assert "expected only checkpoints named checkpoint-*" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*command, "--output", str(tmp_path / "file")]) == 2
    assert "output: expected a directory, got the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "made, content, message",
    [
        ("checkpoint-500/trainer_state.json", "{}", "which holds checkpoint-500 of another run"),
        ("checkpoint-best/model.safetensors", "", "which holds checkpoint-best of another run"),
        ("config.json", "{}", "which holds a model"),
        ("settings.json", "steps = 5", "settings: expected JSON, got"),
        ("settings.json", "[5]", "settings: expected named entries, got [5]"),
    ],
)
def test_a_directory_of_something_else_is_refused_and_left_alone(made, content, message, tmp_path, capsys):
    file = tmp_path / made
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    assert main(["finetune", MODEL, *QUICK.split(), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == content


def test_only_checkpoints_are_cleared_away(tmp_path):
    for name in ("checkpoint-2", "checkpoint-2-kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3.zip").write_text("")
    (tmp_path / "checkpoint-4").write_text("")
    with OutputDirectory(tmp_path) as output:
        report = RunReport("finetune", "mine", {}, {}, {}, {})
        finish(report, output, PlotSettings(plots=False), checkpoints_in(output))
    assert {path.name for path in tmp_path.glob("check*")} == {"checkpoint-2-kept", "checkpoint-3.zip", "checkpoint-4"}


def test_zeros_are_told_of_and_packed_weights_refused_before_anything_trains(tmp_path, capsys, caplog):
    model, tokenizer = load_model(MODEL, ModelSettings(dtype="float32"))
    prune(model, 0.6, "magnitude")
    short = [*QUICK.split(), "--steps", "1"]
    for name, change in (("pruned", lambda model: None), ("packed", pack_sparse)):
        change(model)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
    assert main(["finetune", str(tmp_path / "pruned"), *short, "--output", str(tmp_path / "a")]) == 0
    assert "84 matrices have zeros, which this training fills" in caplog.text + capsys.readouterr().err
    assert main(["finetune", str(tmp_path / "packed"), *short, "--output", str(tmp_path / "b")]) == 2
    assert "expected one with adapters (owlore-peft, lora)" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path / "packed"), "--estimate"]) == 0
    told = "not estimated, lora: config: expected that of plain weights, got quantized or packed ones"
    assert told in " ".join(capsys.readouterr().out.split())
    adapted = [*ANY.split(), "--steps", "1", "--method", "lora", "--output", str(tmp_path / "b")]
    assert main(["finetune", str(tmp_path / "packed"), *adapted]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert any("lora_A" in name for name, _ in loaded.named_modules()) and loaded.is_quantized


def test_a_run_that_resumes_with_no_step_left_has_no_time_of_a_step(tmp_path, monkeypatch):
    """It failed while the model was saved; what the second start takes is no training."""

    def fails(*args):
        raise RuntimeError("stopped")

    command = ["finetune", MODEL, *QUICK.split(), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("hf_cod.cli.commands.finetune._saved", fails)
        assert main(command) == 1
    assert main(command) == 0
    report = RunReport.load(tmp_path / "out")
    assert report.results["seconds_a_step"] is None and "per step" not in report.summary[0]


def test_a_choice_of_modules_is_recorded_and_a_run_of_another_is_not_resumed(checkpoint, capsys):
    def finetune_without(*names):
        quick = "--sequence-length 8 --steps 4 --batch-size 2 --micro-batch-size 2 --eval-samples 4 --n-active 2"
        files = ["--text", str(checkpoint / "text.txt"), "--output", str(checkpoint / "out"), "--no-plots"]
        more = [*quick.split(), "--interval", "2", "--rank", "4", "--exclude", *names]
        return main(["finetune", str(checkpoint / "model"), *files, *more])

    assert finetune_without("q_proj", "up_proj") == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["exclude"] == ["q_proj", "up_proj"] and report.settings["include"] is None
    assert any("8 matrices" in note and "are not trained, by exclude" in note for note in report.notes)
    old, new = (dict(load_model(str(checkpoint / name))[0].named_parameters()) for name in ("model", "out"))
    assert all(torch.equal(old[n], new[n]) for n in old if "q_proj" in n or "up_proj" in n)
    assert any(not torch.equal(old[n], new[n]) for n in old if "o_proj" in n)
    capsys.readouterr()
    assert finetune_without("o_proj") == 2
    assert "output: expected" in capsys.readouterr().err
