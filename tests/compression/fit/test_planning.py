"""Plans that meet a budget, and hf-cod fit, on the small model that the package carries."""

import gc
import itertools
import math
import re
import sys
import weakref
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_cod.compression.fit.search
import hf_cod.compression.fit.trials
from hf_cod import FitPlan, RunReport, apply_steps, drop, perplexity, plan_fit
from hf_cod.cli.commands.fit import print_plan
from hf_cod.cli.main import main
from hf_cod.compression.fit.budget import Budget
from hf_cod.compression.fit.knobs import KNOBS, Applying
from hf_cod.compression.fit.search import NOT_COMBINED
from hf_cod.compression.fit.trials import Trials
from hf_cod.io.journal import Journal
from hf_cod.io.models import embedded_model, load_model
from hf_cod.io.text import SampleSettings, embedded_text, split_samples, token_batches
from hf_cod.layers.size import ModelSize, size_of
from hf_cod.layers.stack import find_decoder_layers
from tests.forged import forge, forge_layer
from tests.tiny_models import build

MODEL = embedded_model("pre")
QUICK = "--max-samples 4 --tuning-samples 2 --eval-samples 2 --sequence-length 64 --dtype float32 --device cpu"


def make():
    """The first six layers of it: half the time."""
    model = load_model(MODEL)[0]
    drop(model, range(6, 12))
    return model


@pytest.fixture(scope="module")
def texts():
    tokenizer = load_model(MODEL)[1]
    return split_samples(token_batches(tokenizer, embedded_text(), SampleSettings(64, 6, 2)), 4)


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """A journal that plans for several budgets share, as what they try is the same."""
    return tmp_path_factory.mktemp("trials")


@pytest.mark.parametrize(
    "kind, knobs, budget",
    [
        ("parameter_share", ["rank"], 0.8),
        ("parameter_share", ["depth", "width"], 0.7),
        pytest.param("bits", ["rank", "bits"], 3.4, marks=pytest.mark.slow),
        ("memory", ["rank", "sparsity"], None),
    ],
)
def test_plans_meet_their_budget_and_are_the_best_of_what_was_measured(kind, knobs, budget, texts, trials):
    intact = size_of(make())
    budget = budget or intact.bytes - 0.5 * intact.layer_bytes
    plan = plan_fit(make, kind, budget, *texts, knobs=knobs, n_verified=1, journal=trials)
    model = make()
    apply_steps(model, plan.steps, Applying(texts[0]))
    size = size_of(model)
    used = {
        "parameter_share": size.layer_weights / intact.layer_weights,
        "bits": 8 * size.layer_bytes / intact.layer_weights,
        "memory": size.bytes,
    }[kind]
    assert used <= budget
    assert math.log(perplexity(model, texts[1])) == pytest.approx(plan.loss, abs=1e-4)
    assert plan.loss == min(row["loss"] for row in plan.tried)
    alone = [row for row in plan.tried if len(row["steps"]) == 1]
    assert alone and all(plan.loss <= row["loss"] for row in alone)
    assert set(plan.alone) == set(knobs)


def test_texts_are_split_into_samples_for_calibration_and_for_the_choice(texts, trials):
    """As by hand, and before the model is loaded only one form is accepted."""
    tokenizer = load_model(MODEL)[1]
    given = {"tokenizer": tokenizer, "texts": embedded_text(), "sequence_length": 64, "max_samples": 4, "batch_size": 2}
    options = {"knobs": ["rank"], "n_verified": 1, "journal": trials}
    plan = plan_fit(make, "parameter_share", 0.8, *texts, **options)
    assert plan_fit(make, "parameter_share", 0.8, **given, tuning_samples=2, **options) == plan
    for arguments, changes, message in [
        (texts, given, "calibration: expected batches, or tokenizer and texts, got both"),
        ((), {}, "calibration: expected batches, or tokenizer and texts, got neither"),
        (texts[:1], {}, "tuning: expected batches, or tokenizer and texts, got neither"),
        ((), {"texts": "one"}, "tokenizer: expected the model's tokenizer with texts, got none"),
        ((), {"tokenizer": tokenizer}, "texts: expected texts with the tokenizer, or batches, got neither"),
        ((), {**given, "tuning_samples": 0}, "tuning_samples: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_fit(pytest.fail, "parameter_share", 0.8, *arguments, **changes)
    with pytest.raises(ValueError, match="max_samples: expected tokenizer and texts, which it applies to, got batches"):
        plan_fit(make, "parameter_share", 0.8, *texts, max_samples=4)
    short = {**given, "texts": tokenizer.decode(tokenizer(embedded_text())["input_ids"][:100])}
    with pytest.raises(ValueError, match="texts: expected at least two samples, for calibration and for the choice"):
        plan_fit(make, "parameter_share", 0.8, **short)


def test_a_model_that_meets_the_budget_is_left_as_it_is(texts, tmp_path, monkeypatch, capsys):
    """Before anything is tried."""
    tried = []
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", lambda model, steps, how: tried.append(steps))
    plan = plan_fit(make, "bits", 40.0, *texts)
    assert tried == [{}] and plan.steps == {} and plan.loss == plan.intact_loss and plan.alone == {}
    assert plan.loss == pytest.approx(math.log(perplexity(make(), texts[1])), abs=1e-4)
    output = tmp_path / "out"
    assert main(["fit", MODEL, "--memory", "1GB", *QUICK.split(), "--output", str(output)]) == 0
    assert tried == [{}, {}, {}] and capsys.readouterr().out.count("The model already meets the budget") == 1
    state = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(
        torch.equal(tensor.float(), state[name].float()) for name, tensor in load_model(MODEL)[0].state_dict().items()
    )
    assert (output / "trade_off.png").is_file()


def test_what_the_model_cannot_do_is_left_out_and_told(texts, monkeypatch):
    """A missing package, methods that fail at their first level, in the middle, at the last one, at all."""

    def breaking(knob, levels, works):
        def apply(model, level, how):
            if not works(level):
                raise ValueError(f"plan: not at {level}")
            apply_rank(model, level, how)

        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_: levels, tried=3, apply=apply))

    apply_rank = KNOBS["rank"].apply
    breaking("rank", [0.1, 0.2, 0.3], lambda level: level < 0.3)
    breaking("width", [0.1, 0.2, 0.3], lambda level: level > 0.1)
    breaking("depth", [1.0, 2.0], lambda level: False)
    breaking("sparsity", [0.1, 0.2, 0.3], lambda level: level != 0.2)
    monkeypatch.setitem(sys.modules, "hf_cod.compression.quantization.bnb", None)
    plan = plan_fit(make, "bits", 13.5, *texts, n_verified=0)
    assert plan.notes.pop() == NOT_COMBINED
    assert {knob: found["levels"] for knob, found in plan.alone.items()} == {
        "rank": [0.1, 0.2],
        "width": [0.2, 0.3],
        "sparsity": [0.1],
    }
    assert [row["steps"] for row in plan.tried] == [{"width": 0.2}, {"rank": 0.2}]
    assert plan.notes[0].startswith("bits is left out: import of hf_cod.compression.quantization.bnb")
    assert plan.notes[1:] == [
        "depth is left out: plan: not at 2.0",
        "10% of the weights removed by heads and channels, and less, are left out: plan: not at 0.1",
        "30% of the weights removed by low rank, and more, are left out: plan: not at 0.3",
        "20% of the weights zero and packed, and more, are left out: plan: not at 0.2",
        "sparsity alone does not meet the budget",  # at 10%, where it works
    ]
    with pytest.raises(ValueError, match=r"plan: not at 2\.0"):
        plan_fit(make, "parameter_share", 0.8, *texts, knobs=["depth"])
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", None)  # nothing is measured before it is told
    with pytest.raises(ImportError, match="bnb"):
        plan_fit(make, "bits", 13.5, *texts, knobs=["rank", "bits"])


@pytest.mark.parametrize(
    "family, knobs",
    [("llama", []), ("gpt_oss", ["sparsity"]), ("mixtral", ["sparsity"]), ("bert_headless", [])],
)
def test_what_a_model_shows_at_once(family, knobs):
    stack = find_decoder_layers(build(family))
    for knob in KNOBS:
        if not KNOBS[knob].concerns(stack):
            assert knob == "experts" and family in ("llama", "bert_headless")
            continue
        with pytest.raises(ValueError, match=r"known structure|not packed") if knob in knobs else nullcontext():
            KNOBS[knob].check(stack)
    assert len(find_decoder_layers(stack.model)) == 4
    with pytest.raises(ValueError, match="layers: expected at least 3, of which up to a third are removed, got 2"):
        KNOBS["depth"].check(find_decoder_layers(build(family, layers=2)))


def test_experts_of_a_mixture(tmp_path):
    """A plan that removes experts meets its budget, and the result is a stock checkpoint."""
    calibration, tuning = ([{"input_ids": (torch.arange(32) + start).view(2, 16) % 64}] for start in (0, 9))
    mixture = partial(build, "mixtral")
    plan = plan_fit(mixture, "parameter_share", 0.8, calibration, tuning, knobs=["experts"], n_verified=0)
    model, intact = mixture(), mixture()
    apply_steps(model, plan.steps, batches=calibration)
    share = size_of(model).layer_weights / size_of(intact).layer_weights
    assert share <= 0.8 and set(plan.steps) == {"experts"}
    assert KNOBS["experts"].left(find_decoder_layers(intact), plan.steps["experts"]) == pytest.approx(share, abs=1e-3)
    model.save_pretrained(tmp_path)
    assert type(again := AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    assert torch.equal(again(**tuning[0]).logits, model.eval()(**tuning[0]).logits)
    with pytest.raises(ValueError, match="model: expected a mixture of experts"):
        plan_fit(make, "parameter_share", 0.8, calibration, tuning, knobs=["experts"])


def test_models_of_failed_trials_are_not_kept(texts, monkeypatch):
    """One at a time is in memory."""
    made, alive = [], []

    def making():
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        model = make()
        made.append(weakref.ref(model))
        return model

    def fails(model, level, how):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(KNOBS, "width", replace(KNOBS["width"], apply=fails))
    for knob, level in {"depth": 1.0, "rank": 0.1}.items():
        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_, level=level: [level]))
    plan = plan_fit(making, "parameter_share", 0.91, *texts, n_verified=0)
    assert plan.notes[0] == "width is left out: out of memory"
    assert len(alive) == 7 and max(alive) == 0  # the intact one twice, width at three levels, the others at one


def test_trials_share_what_is_measured_before_anything_changes(texts, tmp_path, monkeypatch):
    """The search for two layers reads what the one for one layer measured; spectra are found once."""
    found, add = [], Journal.add

    def noted(self, key, value):
        add(self, key, value)
        if self.path is not None:  # others hold losses of a model with maps in it
            found.append((self.work, key))

    monkeypatch.setattr(Journal, "add", noted)
    for knob, levels in {"rank": [0.2, 0.3], "depth": [1.0, 2.0]}.items():
        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_, levels=levels: levels))
    plan_fit(make, "parameter_share", 0.8, *texts, knobs=["depth", "rank"], n_verified=0, journal=tmp_path)
    assert any(key.startswith("without ") for _, key in found)
    assert len(found) == len(set(found)), "nothing is measured twice"


def test_no_single_method_is_lost(texts, tmp_path, monkeypatch):
    """What was measured within the budget counts, where the level between was not found, or is worse."""
    for knob, found in {"rank": [0.2, 0.4], "depth": [1.0]}.items():
        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_, found=found: found))
    options = {"knobs": ["depth", "rank"], "n_verified": 0, "journal": tmp_path}
    plan = plan_fit(make, "parameter_share", 0.82, *texts, **options)
    assert all(left < 0.82 for left in plan.alone["rank"]["left"])
    assert plan.loss == min(plan.alone["rank"]["losses"]) and [*plan.steps] == ["rank"]
    assert plan.notes == ["depth alone does not meet the budget", NOT_COMBINED]
    monkeypatch.setattr(hf_cod.compression.fit.search, "TIGHTENINGS", 0)  # as if each choice had missed the budget
    assert plan_fit(make, "parameter_share", 0.82, *texts, **options) == plan


@pytest.mark.parametrize("kind", ["parameter_share", "bits", "memory"])
def test_a_budget_holds_to_the_byte_without_verified_combinations(kind, texts, tmp_path, monkeypatch):
    """Exactly the size of a single method is enough; a bit less is not, though methods can meet it together."""
    for knob, found in {"rank": [0.2], "depth": [1.0]}.items():
        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_, found=found: found))
    intact, model = size_of(make()), make()
    apply_steps(model, {"rank": 0.2}, Applying(texts[0]))
    exact = Budget(kind, 1.0, intact).used(size_of(model))
    options = {"knobs": ["depth", "rank"], "journal": tmp_path}
    plan = plan_fit(make, kind, exact, *texts, **options, n_verified=0)
    assert plan.steps == {"rank": 0.2} and NOT_COMBINED in plan.notes
    assert NOT_COMBINED not in plan_fit(make, kind, exact, *texts, **options, n_verified=1).notes
    less = math.nextafter(exact, 0) if kind != "memory" else exact - 1
    with pytest.raises(ValueError, match=rf"{kind}: expected (at least .* can reach alone|a budget that a measured)"):
        plan_fit(make, kind, less, *texts, **options, n_verified=0)
    plan = plan_fit(make, kind, less, *texts, **options, n_verified=1)
    assert [*plan.steps] == ["depth", "rank"] and Budget(kind, less, intact).used(ModelSize(**plan.size)) <= less


def test_without_combinations_a_budget_out_of_reach_of_each_is_refused_at_once(texts, monkeypatch):
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", None)
    with pytest.raises(ValueError, match=r"least that depth, rank can reach alone, got 0\.4; n_verified of 1 or more"):
        plan_fit(make, "parameter_share", 0.4, *texts, knobs=["depth", "rank"], n_verified=0)


def test_what_was_measured_is_not_measured_again(texts, trials, tmp_path, monkeypatch):
    first = plan_fit(make, "parameter_share", 0.8, *texts, knobs=["rank"], journal=trials)
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", None)
    assert plan_fit(make, "parameter_share", 0.8, *texts, knobs=["rank"], journal=trials) == first
    assert FitPlan.load(first.save(tmp_path / "plan.json")) == first
    with pytest.raises(TypeError):  # another budget needs other trials
        plan_fit(make, "parameter_share", 0.62, *texts, knobs=["rank"], journal=trials)


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("loss", math.nan, "expected a finite number, got nan"),
        ("loss", -5.0, "loss: expected a finite number in 0..709.783, got -5.0"),
        ("loss", 1e30, "loss: expected a finite number in 0..709.783, got 1e+30"),
        ("bytes", 0, "bytes: expected a whole number in 1.."),
        ("layer_weights", -1, "layer_weights: expected a whole number in 1.."),
        ("layer_bytes", 1 << 60, "layer_bytes: expected a whole number in 1.."),
        ("bytes", 1, "layer_bytes: expected up to 1 (bytes), got "),
    ],
)
@pytest.mark.parametrize("steps", [{}, {"depth": 1}])
def test_trials_that_cannot_be_are_measured_again(steps, place, value, message, texts, tmp_path, caplog):
    options = (make, *texts, tmp_path, "work", None, size_of(make()))
    trial = Trials(*options).measure(steps)
    size = asdict(trial.size)
    edited = [value, size] if place == "loss" else [trial.loss, {**size, place: value}]
    Journal(tmp_path / "trials.jsonl", "work").add(f"trial {'depth 1' if steps else ''}", edited)
    assert Trials(*options).measure(steps) == trial
    assert message in caplog.text and "): it is computed again" in caplog.text


def test_the_intact_model_has_its_own_size(texts, tmp_path, caplog):
    options = (make, *texts, tmp_path, "work", None, size_of(make()))
    trial = Trials(*options).measure({})
    edited = {**asdict(trial.size), "layer_weights": 1}
    Journal(tmp_path / "trials.jsonl", "work").add("trial ", [trial.loss, edited])
    assert Trials(*options).measure({}) == trial
    assert "damaged result (size: expected {'bytes': " in caplog.text


def test_an_edited_journal_does_not_leave_a_step_out(texts, tmp_path):
    """A trial that cannot be is measured again; a method's finished layer that cannot be is an error, not a method
    that fails."""
    options = {"knobs": ["rank"], "n_verified": 0, "journal": tmp_path}
    plan = plan_fit(make, "parameter_share", 0.8, *texts, **options)
    forge(tmp_path / "trials.jsonl", lambda value: None, "trial rank")
    assert plan_fit(make, "parameter_share", 0.8, *texts, **options) == plan
    (tmp_path / "trials.jsonl").unlink()
    forge_layer(next(tmp_path.glob("*-00001.safetensors")), note=lambda note: [])
    with pytest.raises(ValueError, match=r"^note: expected nothing, got \[\] in '.*safetensors'"):
        plan_fit(make, "parameter_share", 0.8, *texts, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("size", 0.5), "kind: expected one of memory, parameter_share, bits, got 'size'"),
        (
            ("parameter_share", 0.45),
            r"parameter_share: expected at least 0\.5, the least that rank can reach, got 0\.45",
        ),
        # Two thirds of the layers, three fifths of each by width, half of that by rank, 3.127 bits a weight; and norms
        (
            ("memory", 5, None),
            r"memory: expected at least .*MB, .* got 5e-06MB; a number without a unit is in bytes, 5MB ",
        ),
        (("bits", 0.5, None), r"bits: expected at least 0\.62\d*, the least that depth, width, rank, sparsity, bits"),
        (("bits", 8.0, ["rnk"]), "knobs: expected some of .*, got 'rnk'"),
        (("parameter_share", 0.5, ["bits"]), r"knobs: .* parameters \(depth, experts, width, rank\), got bits"),
        (("memory", 1e4, None), r"memory: expected at least [\d.]+MB, the least .*, got 0\.01MB"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(arguments, message, texts, monkeypatch):
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", None)
    kind, budget, knobs = (*arguments, ["rank"])[:3]
    with pytest.raises(ValueError, match=message):
        plan_fit(make, kind, budget, *texts, knobs=knobs)


def test_a_budget_out_of_reach_says_what_was_left_out(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_cod.compression.quantization.bnb", None)
    monkeypatch.setattr(hf_cod.compression.fit.trials, "apply_steps", None)
    with pytest.raises(ValueError, match=r"the least that .*rank.* can reach together, got 0\.001; bits is left out:"):
        plan_fit(make, "bits", 0.001, *texts)


def test_bad_arguments(texts):
    for kind, budget, message in (
        ("parameter_share", 60, "parameter_share: expected a share between 0 and 1, got 60"),
        ("bits", math.nan, "bits: expected a finite number above 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_fit(make, kind, budget, *texts)
    with pytest.raises(ValueError, match="batches: expected dicts of tensors for the model's forward, got str"):
        plan_fit(make, "bits", 3.0, ["some text"], texts[1])
    with pytest.raises(ValueError, match="tuning: expected at least one batch, got none"):
        plan_fit(make, "bits", 3.0, texts[0], [])
    with pytest.raises(ValueError, match="make: expected a function that loads the model, got a model"):
        plan_fit(make(), "bits", 3.0, *texts)


def test_the_command_shows_the_plan_and_then_runs_it(tmp_path, capsys):
    output = tmp_path / "out"
    command = ["fit", MODEL, "--memory", "7MB", "--knobs", "rank", "bits", "--n-verified", "1", *QUICK.split()]
    command += ["--output", str(output)]
    assert main([*command, "--plan-only"]) == 0
    assert capsys.readouterr().out.count("Chosen:") == 1 and not (output / "config.json").exists()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("Chosen:") == 1
    assert "Perplexity goes from" in shown and "The budget is met: memory " in shown
    report = RunReport.load(output)
    assert [*report.results["speed"]] == ["intact", "fitted"] and "Tokens per second: " in shown
    model = AutoModelForCausalLM.from_pretrained(output)
    assert size_of(model).bytes == report.results["memory_bytes"]["fitted"] <= 7_000_000
    assert report.results["plan"]["steps"] == FitPlan.load(output / "fit_plan.json").steps
    assert (output / "trade_off.png").is_file()


def test_a_model_above_the_budget_is_not_written(tmp_path, capsys, monkeypatch):
    """As if a method gave another size than when the plan was measured."""

    def grows(model, level, how):
        if not how.show_progress:
            drop(model, range(6))

    monkeypatch.setitem(KNOBS, "depth", replace(KNOBS["depth"], levels=lambda *_: [6.0], tried=1, apply=grows))
    output = tmp_path / "out"
    command = ["fit", MODEL, "--parameter-share", "0.6", "--knobs", "depth", *QUICK.split(), "--output", str(output)]
    assert main(command) == 2
    assert "parameter_share: expected at most 0.6 with the plan's steps, got 1" in capsys.readouterr().err
    assert not (output / "config.json").exists() and not (output / "report.json").exists()


def test_estimates_are_marked_in_the_trade_off(capsys):
    """Rows whose steps were measured, alone or together, show the loss; the others a sign that is explained."""
    alone = {"rank": {"levels": [0.1, 0.5], "losses": [2.125, 2.5], "left": [0.9, 0.5]}}
    both = {"rank": 0.5, "bits": 4.0}
    tried = [{"steps": both, "expected": 3.0, "loss": 3.25, "left": 0.2}]
    steps = [{"rank": 0.1}, {"rank": 0.2}, both, {"rank": 0.2, "bits": 4.0}]
    curve = [[share, 2.75, each] for each in steps for share in (0.7, 0.6)]  # every other one is shown
    plan = FitPlan("bits", 6.0, both, 3.25, 1.0, {}, alone, tried, curve)
    print_plan(plan, alone=True)
    shown = capsys.readouterr().out
    rows = [line.split()[:3] for line in shown.splitlines() if line.strip().startswith("60%")]
    assert "-: not measured. The expected loss" in " ".join(shown.split())
    assert [row[2] for row in rows] == ["2.125", "-", "3.250", "-"]
    assert [plan.measured_loss(each) for each in ({}, {"bits": 3.0})] == [1.0, None]


@pytest.mark.parametrize("steps", [{"rank": 0.5}, {"rank": 0.8, "bits": 4.0}])
def test_the_best_single_method_is_named_unless_it_is_the_plan(steps, capsys):
    tried = [{"steps": each, "expected": 2.0, "loss": 2.0, "left": 0.5} for each in ({"rank": 0.5}, steps)]
    print_plan(FitPlan("bits", 6.0, steps, 2.0, 1.0, {}, {}, tried, []), alone=True)
    shown = capsys.readouterr().out
    assert shown.count("Chosen: ") == 1 and ("best single method" in shown) == (len(steps) > 1)


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "budget: expected one of --memory, --parameter-share and --bits, got none"),
        (["--bits", "3.5", "--parameter-share", "0.5"], "budget: .*got parameter_share and bits"),
        (["--memory", "much"], "memory: expected a size such as 24GB or 80GiB, got 'much'"),
        (["--parameter-share", "1.5"], "parameter_share: expected a share between 0 and 1, got 1.5"),
    ],
)
def test_bad_options(more, message, capsys, tmp_path):
    assert main(["fit", MODEL, *more, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_plan_against_all_combinations_on_a_small_grid(texts):
    """How far adding up costs leads: what is chosen is within a hundredth of a nat of the best of all twelve.

    The figures of docs/benchmarks/compression.md; run with -s to see them.
    """
    levels = {"rank": [None, 0.1, 0.25], "bits": [None, 4.0, 3.5, 3.0]}
    budget = 3.4
    intact = size_of(make()).layer_weights
    losses = []
    for rank, bits in itertools.product(levels["rank"], levels["bits"]):
        steps = {knob: level for knob, level in (("rank", rank), ("bits", bits)) if level is not None}
        model = make()
        apply_steps(model, steps, Applying(texts[0]))
        if 8 * size_of(model).layer_bytes / intact <= budget:
            losses.append(math.log(perplexity(model, texts[1])))
    plan = plan_fit(make, "bits", budget, *texts, knobs=["rank", "bits"], n_verified=3)
    print(f"loss of the plan {plan.loss:.4f}, of the best of {len(losses)} within the budget {min(losses):.4f}")
    assert losses and plan.loss <= min(losses) + 0.01


def test_steps_are_described():
    assert {knob: k.describe(0.5) for knob, k in KNOBS.items()}["rank"] == "50% of the weights removed by low rank"
    assert [KNOBS["depth"].describe(n) for n in (1.0, 2.0)] == ["1 layer removed", "2 layers removed"]
