"""hf-cod prune on a tiny model: what is written, resumed and refused."""

import pytest

from hf_cod import ExpertScores, LayerAllocation, find_decoder_layers, perplexity
from hf_cod.cli.commands.prune import PruneOptions, make_parser
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from tests.cli.runs import QUICK, TEXT, prune
from tests.fresh_processes import run_fresh
from tests.tiny_models import build_mixture


def test_prune_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    more = ["--sparsity", "0.7", "--spread", "0.1", "--eval-samples", "5", "--force"]
    assert prune(checkpoint, "out", *more) == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    assert {"model.safetensors", "scores.json", "allocation.json", "report.md", "sparsity.png", "score.png"} <= names
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    assert "hf-cod pack makes the model smaller" in shown
    model, tokenizer = load_model(str(checkpoint / "out"))
    stack = find_decoder_layers(model)
    zeros = [sum(int((W == 0).sum()) for _, W in stack.matrices(i)) for i in range(4)]
    assert report.layers["sparsity"] == [n / stack.count_weights(0) for n in zeros]
    assert sum(zeros) / 4 / stack.count_weights(0) == pytest.approx(0.7, abs=1e-3)
    assert max(report.layers["sparsity"]) <= 0.8 + 1e-3 and min(report.layers["sparsity"]) >= 0.6 - 1e-3
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['pruned'])} (uniform plan:" in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["pruned"], rel=1e-5), "the later samples"
    assert report.settings["samples"] == 4 and report.results["evaluation"]["samples"] == 5
    assert prune(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize("pattern, kept", [("2:4", {4}), ("N:8", {2, 3, 4, 5, 6})])
def test_prune_by_pattern_and_by_earlier_scores(checkpoint, pattern, kept):
    sizes = score_layers(load_model(str(checkpoint / "model"))[0], method="uniform").parameters
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], sizes).save(checkpoint / "scores.json")
    more = [] if pattern == "2:4" else ["--spread", "0.25", "--scores", str(checkpoint / "scores.json")]
    assert prune(checkpoint, "out", "--pattern", pattern, "--method", "magnitude", "--no-baseline", *more) == 0
    stack = find_decoder_layers(load_model(str(checkpoint / "out"))[0])
    for i in range(4):
        counts = {int(n) for _, W in stack.matrices(i) for n in (W != 0).view(-1, 8).sum(-1).unique()}
        assert len(counts) == 1 and counts <= kept
    report = RunReport.load(checkpoint / "out")
    assert "uniform" not in report.results["perplexity"]
    assert report.settings["score"] == (None if pattern == "2:4" else "mine")


def test_auto_says_what_it_chose(checkpoint, capsys):
    arguments = ["score", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    assert main([*arguments, "--method", "auto", "--target", "0.6", "--output", str(checkpoint / "scored")]) == 0
    scores = LayerScores.load(checkpoint / "scored" / "scores.json")
    assert scores.settings["target"] == 0.6 and scores.remarks[0] in capsys.readouterr().out
    assert prune(checkpoint, "out", "--score", "auto", "--sparsity", "0.6", "--no-plots") == 0
    assert "auto chose" in capsys.readouterr().out
    plan = LayerAllocation.load(checkpoint / "out" / "allocation.json")
    width = LayerScores.load(checkpoint / "out" / "scores.json").settings["spread"]
    assert max(abs(value - 0.6) for value in plan.values) <= width + 1e-9


def test_prune_and_recover(checkpoint, capsys):
    more = ["--score", "uniform", "--recover-steps", "20", "--recover-learning-rate", "0.01", "--no-plots"]
    assert prune(checkpoint, "out", *more) == 0
    report = RunReport.load(checkpoint / "out")
    found = report.results["perplexity"]
    assert found["recovered"] < found["pruned"] and report.results["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "by recovery" in capsys.readouterr().out
    assert prune(checkpoint, "other", "--recover-steps", "-1") == 2


@pytest.mark.process
def test_a_killed_pruning_goes_on_where_it_stopped(checkpoint):
    code = (
        "import sys, os\n"
        "from hf_cod.layers.sequential import FinishedLayers\n"
        "add, count = FinishedLayers.add, [0]\n"
        "def dies(self, index, unseen):\n"
        "    add(self, index, unseen)\n"
        "    count[0] += 1\n"
        "    if count[0] == 6: os._exit(9)\n"
        "FinishedLayers.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["prune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    killed = run_fresh(code, *arguments, "--output", checkpoint / "run")
    assert killed.returncode == 9
    kept = {path.name: path.stat().st_mtime_ns for path in (checkpoint / "run" / "journal").glob("*.safetensors")}
    assert len(kept) == 6, "four layers pruned alike, two of the plan"
    assert prune(checkpoint, "run", "--no-plots") == 0 and prune(checkpoint, "whole", "--no-plots") == 0
    weights = [(checkpoint / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    resumed, whole = (RunReport.load(checkpoint / name) for name in ("run", "whole"))
    assert resumed.layers == whole.layers and resumed.results == whole.results


def test_prune_never_writes_into_a_directory_of_something_else(checkpoint, capsys):
    for name, file in (("model2", "model.safetensors"), ("notes/journal", "2024.txt"), ("mixed/journal", "a/b")):
        path = checkpoint / name / file
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        assert prune(checkpoint, name.split("/")[0]) == 2
        assert "output: expected a new directory, an empty one" in capsys.readouterr().err
        assert path.read_text() == "precious" and [p for p in path.parent.iterdir()] == [path]
    (checkpoint / "empty").mkdir()
    assert prune(checkpoint, "empty", "--score", "uniform", "--no-plots") == 0
    assert {p.name for p in checkpoint.iterdir() if p.name.startswith(".")} == set(), "nothing is left beside it"


def test_prune_that_fails_at_the_end_leaves_no_half_model(checkpoint, monkeypatch):
    monkeypatch.setattr(RunReport, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(checkpoint, "out", "--score", "uniform", "--no-plots")
    assert [path.name for path in (checkpoint / "out").iterdir()] == ["journal"]
    monkeypatch.undo()
    assert prune(checkpoint, "out", "--score", "uniform", "--no-plots") == 0
    assert "journal" not in {path.name for path in (checkpoint / "out").iterdir()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "0.7", "--spread", "0.5"], "spread: expected 0..0.3"),
        (["--pattern", "N:5"], "pattern: expected rows of a multiple of 5"),
        (["--pattern", "N:1"], "group: expected at least 2"),
        (["--pattern", "N:8", "--sparsity", "0.9"], "budget: expected sparsity in 0..0.875"),
        (["--scores", "other.json"], "scores: expected those of a model with"),
        (["--scores", "none.json"], "scores: expected a file"),
    ],
)
def test_prune_fails_before_anything_is_measured(checkpoint, capsys, monkeypatch, arguments, message):
    def never(*args, **kwargs):
        raise AssertionError("measured already")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", never)
    monkeypatch.chdir(checkpoint)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [7] * 4).save("other.json")
    assert prune(checkpoint, "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (checkpoint / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "best"], "method: expected one of magnitude, wanda, sparsegpt"),
        (["--score", "best"], "score: expected one of owl"),
        (["--sparsity", "1.2"], "sparsity: expected a share in 0..1, got 1.2"),
        (["--sparsity", "0.9", "--spread", "0.2"], "spread: expected 0..0.1"),
        (["--pattern", "2:5"], "pattern: expected rows of a multiple of 5"),
        (["--pattern", "2of4"], "pattern: expected N:M"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "pattern: expected no sparsity or spread with 2:4"),
        (["--sequence-length", "300"], "text: expected at least two samples of 300 tokens"),
        (["--sequence-length", "3000"], "at least one sample of 3000 tokens"),
        (["--eval-samples", "0"], "eval_samples: expected at least 1"),
        (["--scores", "none.json"], "scores: expected a file"),
    ],
)
def test_prune_with_bad_input(checkpoint, capsys, arguments, message):
    assert prune(checkpoint, "out", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert main(["prune", str(checkpoint / "model"), "--output", str(checkpoint / "model")]) == 2
    assert "output: expected another directory than the model's" in capsys.readouterr().err


def test_the_default_score_is_the_one_that_never_lost(checkpoint):
    """angular; the settings of owl mean owl, and what is named is taken."""
    assert PruneOptions().score == "angular" and PruneOptions(score="fisher").score == "fisher"
    assert PruneOptions(threshold=7.0).score == "owl" and PruneOptions(per_module=True).score == "owl"
    assert prune(checkpoint, "out", "--no-baseline", "--no-plots") == 0
    assert RunReport.load(checkpoint / "out").settings["score"] == "angular"
    assert LayerScores.load(checkpoint / "out" / "scores.json").method == "angular"


@pytest.mark.parametrize("chosen", [(), ("--score", "angular")])
def test_a_default_score_that_a_model_does_not_have_names_another(checkpoint, capsys, monkeypatch, chosen):
    def refuse(*_, **__):
        raise ValueError("model: expected layers that return their hidden state, got others")

    monkeypatch.setattr("hf_cod.cli.work.score_layers", refuse)
    assert prune(checkpoint, "out", "--no-plots", *chosen) == 2
    assert ("--score uniform requires no measurement" in capsys.readouterr().err) == (not chosen)


def test_a_score_that_does_harm_gives_way(checkpoint, capsys):
    """Scores that spare the layer that matters least: of the two plans the better one is written."""
    sizes = score_layers(load_model(str(checkpoint / "model"))[0], method="uniform").parameters
    found = {}
    for name, values in (("rising", [1.0, 2.0, 3.0, 4.0]), ("falling", [4.0, 3.0, 2.0, 1.0])):
        LayerScores("m", name, values, sizes).save(checkpoint / "scores.json")
        given = ["--scores", str(checkpoint / "scores.json"), "--spread", "0.2", "--no-plots"]
        assert prune(checkpoint, f"{name}-forced", *given, "--force") == 0
        assert prune(checkpoint, name, *given) == 0
        shown = capsys.readouterr().out
        forced, report = (RunReport.load(checkpoint / f"{name}{end}") for end in ("-forced", ""))
        by_score, alike = (forced.results["perplexity"][key] for key in ("pruned", "uniform"))
        assert report.results["perplexity"]["pruned"] == pytest.approx(min(by_score, alike), rel=1e-4)
        plan = LayerAllocation.load(checkpoint / name / "allocation.json")
        harmful = by_score > alike
        assert plan.method == ("uniform" if harmful else name) and (max(plan.values) == min(plan.values)) == harmful
        assert (f"score {name} had a higher perplexity" in shown) == harmful == ("fallback" in report.results)
        found[name] = harmful
    assert True in found.values(), "else nothing was seen here"


def test_a_choice_of_modules_is_recorded_and_the_budget_is_theirs(checkpoint, capsys):
    more = ["--include", r".*\.[123]\..*", "--exclude", "up_proj", "q_proj", "--sparsity", "0.6", "--spread", "0.1"]
    assert prune(checkpoint, "out", *more, "--force", "--no-plots") == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["include"] == r".*\.[123]\..*" and report.settings["exclude"] == ["up_proj", "q_proj"]
    old, new = (find_decoder_layers(load_model(str(checkpoint / name))[0]) for name in ("model", "out"))
    kept, zeros, chosen = [], 0, 0
    for index in range(4):
        for (name, before), (_, after) in zip(old.matrices(index), new.matrices(index), strict=True):
            if index == 0 or name.endswith(("up_proj", "q_proj")):
                assert (before == after).all(), name
                kept.append(name)
            else:
                zeros, chosen = zeros + int((after == 0).sum()), chosen + after.numel()
    assert report.results["sparsity"] == zeros / chosen == pytest.approx(0.6, abs=2e-3)
    assert f"{len(kept)} matrices" in next(note for note in report.notes if "are not pruned" in note)
    words = make_parser().words(report.settings)
    assert words[words.index("--include") + 1] == r".*\.[123]\..*"
    assert make_parser().parse(words)[2].exclude == ["up_proj", "q_proj"]
    assert prune(checkpoint, "other", "--exclude", "upproj") == 2
    assert "exclude: expected names of the layers' matrices, such as up_proj" in capsys.readouterr().err


def test_parts_of_layers_have_sparsities_of_their_own(checkpoint):
    more = ["--sparsity", "0.5", "--granularity", "module", "--force", "--no-baseline"]
    assert prune(checkpoint, "out", *more) == 0
    plan, report = LayerAllocation.load(checkpoint / "out" / "allocation.json"), RunReport.load(checkpoint / "out")
    assert plan.method == "owl" and report.results["sparsity"] == pytest.approx(0.5, abs=2e-2)
    assert report.results["module_sparsity"] == pytest.approx(plan.modules, abs=0.1)
    with pytest.raises(ValueError, match="granularity: expected layer with exclude"):
        PruneOptions(granularity="module", exclude=["down_proj"])


def test_experts_have_sparsities_of_their_own(checkpoint, capsys):
    build_mixture("mixtral").save_pretrained(checkpoint / "model")
    more = ["--sparsity", "0.5", "--granularity", "expert", "--spread", "0.3", "--force", "--no-baseline"]
    assert prune(checkpoint, "out", *more) == 0
    plan, report = LayerAllocation.load(checkpoint / "out" / "allocation.json"), RunReport.load(checkpoint / "out")
    experts = ExpertScores.load(checkpoint / "out" / "expert_scores.json")
    assert plan.method == "angular, experts by reap" and experts.method == report.settings["experts"] == "reap"
    assert report.results["sparsity"] == pytest.approx(0.5, abs=2e-3)
    for name, own in report.results["expert_sparsity"].items():
        assert own == pytest.approx(plan.experts[name], abs=1e-2)
        assert min(own) == own[max(range(4), key=lambda e: experts.values[name][e])]
    bank = dict(load_model(str(checkpoint / "out"))[0].named_parameters())["model.layers.0.mlp.experts.down_proj"]
    assert len({int((W == 0).sum()) for W in bank}) > 1
    alike = ["--score", "uniform", "--granularity", "expert", "--experts", "owl", "--method", "magnitude"]
    assert prune(checkpoint, "alike", *alike, "--scores", str(checkpoint / "out" / "scores.json")) == 2
    assert prune(checkpoint, "alike", *alike) == 0
    assert "uniform" in RunReport.load(checkpoint / "alike").results["perplexity"]
    assert prune(checkpoint, "given", *alike[2:], "--scores", str(checkpoint / "out" / "scores.json"), *more[-2:]) == 0
    assert LayerAllocation.load(checkpoint / "given" / "allocation.json").method == "angular, experts by owl"
    capsys.readouterr()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": "reap"}, "experts: expected none with granularity layer; set --granularity expert"),
        (
            {"granularity": "expert", "search": True},
            "granularity: expected layer, block, module with search, got expert",
        ),
        ({"granularity": "expert", "pattern": "2:4"}, "granularity: expected none with pattern 2:4"),
        ({"granularity": "expert", "exclude": ["x"]}, "granularity: expected layer with exclude, got expert"),
        ({"granularity": "expert", "threshold": 3.0, "score": "angular"}, "threshold: expected score owl"),
    ],
)
def test_settings_of_experts_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PruneOptions(**options).check_scored(None)


def test_experts_of_a_model_without_any(checkpoint, capsys):
    assert prune(checkpoint, "out", "--granularity", "expert") == 2
    assert "model: expected a mixture of experts, got" in capsys.readouterr().err


def test_auto_is_measured_at_the_sparsity_of_the_command(checkpoint):
    assert prune(checkpoint, "out", "--sparsity", "0.5", "--score", "auto", "--method", "magnitude") == 0
    found = LayerScores.load(checkpoint / "out" / "scores.json").settings
    assert (found["target"], found["pruner"]) == (0.5, "magnitude")


def test_a_searched_plan_is_applied_and_reported(checkpoint, capsys):
    more = ["--sparsity", "0.6", "--search", "--search-passes", "60", "--granularity", "module", "--force"]
    assert prune(checkpoint, "out", *more) == 0
    report, plan = RunReport.load(checkpoint / "out"), LayerAllocation.load(checkpoint / "out" / "allocation.json")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.index("take up to 60 forward passes") < shown.index("The search found a plan")
    assert report.results["search"] == plan.search and plan.search["passes"] <= 60
    assert report.settings["score"] == "search" and report.results["perplexity"].keys() >= {"uniform", "pruned"}
    assert report.results["sparsity"] == pytest.approx(0.6, abs=1e-2)
    assert {name: report.results["module_sparsity"][name] for name in plan.modules} == pytest.approx(
        plan.modules, abs=1e-2
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--search", "--score", "owl"], "score: expected none with search, which does not use it"),
        (["--search", "--pattern", "2:4"], "pattern: expected none with search"),
        (["--search", "--threshold", "3"], "threshold: expected none with search"),
        (["--search-passes", "9"], "search_passes: expected none with a plan without --search"),
        (["--search", "--search-passes", "9"], "passes: expected at least"),
    ],
)
def test_settings_beside_a_search(checkpoint, capsys, more, message):
    assert prune(checkpoint, "out", *more) == 2
    assert message in capsys.readouterr().err
