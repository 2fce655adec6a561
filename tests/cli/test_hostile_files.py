"""Files that strangers made, at the command line: exit 2, one line that says what is wrong, and nothing is written."""

import io
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_cod import LayerScores, LayerStatistics, RankPlan, diagnose, factorize, pack_sparse, plan_experts, quantize
from hf_cod.cli import main
from hf_cod.io.files import write_json
from tests.earlier_files.read import FILES
from tests.reporting.reports import report
from tests.tiny_models import build, two_batches
from tests.tiny_tokenizers import gpt_like

QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2"]
TEXT = "one two three four five six seven eight nine ten " * 40


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("model", "mixture", "factorized", "packed", "quantized"):
        gpt_like().save_pretrained(folder / name)
    build("llama").save_pretrained(folder / "model")
    build("mixtral").save_pretrained(folder / "mixture")
    model = build("llama")
    factorize(model, RankPlan("parameter_share", 0.9, {"model.layers.0.mlp.up_proj": 3}, "given"), "plain")
    model.save_pretrained(folder / "factorized")
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    pack_sparse(model, 0.4)
    model.save_pretrained(folder / "packed")
    model = build("llama", intermediate_size=64, hidden_size=64)
    quantize(model, bits=3)
    model.save_pretrained(folder / "quantized")
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A directory with the models and a text, from which commands are called."""
    for name in ("model", "mixture", "factorized", "packed", "quantized"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def all_files(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def check_refused(arguments, folder, capsys, *words):
    before = all_files(folder)
    status = main(arguments)
    errors = capsys.readouterr().err.strip()
    assert (status, errors.count("\n")) == (2, 0), errors
    assert ": error: " in errors and "expected" in errors, errors
    for word in words:
        assert word in errors
    assert all_files(folder) == before


def scores(**changes):
    content = {"format": 1, "model": "m", "method": "owl", "values": [0.5] * 4, "parameters": [10] * 4, "settings": {}}
    return json.dumps({**content, **changes})


SCORES = {
    "bool": scores(values=[True] * 4),
    "text": scores(values=["1"] * 4),
    "length": scores(values=[1.0]),
    "nan": scores().replace("0.5", "NaN"),
    "huge": scores().replace("0.5", "1e999"),
    "format": scores(format=2),
    "extra": scores(extra=1),
    "null": "null",
    "cut": scores()[:-9],
    "twice": scores().replace("{", '{"model": "n", ', 1),
    "deep": "[" * 100_000,
    "binary": "\x00\x01",
    "empty": "",
    "negative": scores(parameters=[-1] * 4),
    "escape": scores(method=3, model="\x1b[31m"),
}
# Command -> what comes before the file of scores.
BY_SCORES = {
    "prune": ["prune", "model", "--text", "text.txt", *QUICK, "--scores"],
    "quantize": ["quantize", "model", "--text", "text.txt", *QUICK, "--scores"],
    "narrow": ["narrow", "model", "--text", "text.txt", *QUICK, "--scores"],
    "finetune": ["finetune", "model", "--text", "text.txt", "--steps", "1", "--scores"],
    "heal": ["heal", "factorized", "--teacher", "model", "--text", "text.txt", "--steps", "1", "--scores"],
}


@pytest.mark.parametrize(
    "command, what", [("prune", what) for what in SCORES] + [(command, "bool") for command in BY_SCORES]
)
def test_scores(command, what, place, capsys):
    (place / "scores.json").write_text(SCORES[what])
    check_refused([*BY_SCORES[command], "scores.json", "--no-plots", "--output", "out"], place, capsys, "scores.json")


# What is changed -> how.
PLANS = {
    "bool": lambda plan: plan["removed"].update({next(iter(plan["removed"])): [True]}),
    "unknown": lambda plan: plan["removed"].update({next(iter(plan["removed"])): [9]}),
    "all": lambda plan: plan["removed"].update({name: [0, 1, 2, 3] for name in plan["removed"]}),
    "unequal": lambda plan: plan["removed"].update({next(iter(plan["removed"])): []}),
    "huge": lambda plan: plan.update(count=10**9),
    "layers": lambda plan: plan.update(layers={}),
    "weights": lambda plan: plan.update(parameters=[-1] * 4),
    "extra": lambda plan: plan.update(extra=1),
    "format": lambda plan: plan.update(format=2),
}


@pytest.mark.parametrize("change", PLANS)
def test_plans_of_experts(change, place, capsys):
    model = build("mixtral")
    path = plan_experts(model, 0.25, batches=two_batches(model)).save(place / "plan.json")
    plan = json.loads(path.read_text())
    PLANS[change](plan)
    path.write_text(json.dumps(plan))
    arguments = ["drop-experts", "mixture", "--text", "text.txt", *QUICK, "--no-plots", "--output", "out"]
    check_refused([*arguments, "--plan", "plan.json"], place, capsys)


def statistics_of(place):
    file = FILES / "0.1" / "statistics.safetensors"
    return LayerStatistics.load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda sums, counts: sums.update({next(iter(sums)): torch.rand(4).half()}),
        lambda sums, counts: sums.update({next(iter(sums)): -next(iter(sums.values()))}),
        lambda sums, counts: counts.update({next(iter(counts)): torch.tensor(-3)}),
        lambda sums, counts: counts.clear(),
        lambda sums, counts: [sums.clear(), counts.clear()],
        lambda sums, counts: None,  # whole, and of another model
    ],
    ids=["half", "negative", "counts", "alone", "none", "other"],
)
def test_statistics(change, place, capsys):
    found = statistics_of(place)
    sums, counts = dict(found.squares), dict(found.tokens)
    change(sums, counts)
    tensors = {f"squares/{n}": t for n, t in sums.items()} | {f"tokens/{n}": t for n, t in counts.items()}
    save_file(tensors, place / "sums.safetensors", {"format": "1", "model": "m", "path": "model.layers"})
    arguments = ["score", "model", "--text", "text.txt", *QUICK, "--no-plots", "--output", "out"]
    check_refused([*arguments, "--statistics", "sums.safetensors"], place, capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {"variance": "high"}},
        {"layers": {"variance": [1.0], "mean": [1.0, 2.0]}},
        {"results": {"effective_depth": 3}},
        {"results": {"layer_drop": {}}},
        {"results": {"late_share": "half"}},
        {"results": {"angular_distance": [[1.0], 2]}},
        {"results": {"angular_distance": [[1.0, 2.0]]}},
        {"kind": "prune"},
        {"environment": None},
    ],
)
def test_reports(change, place, capsys):
    report().save(place / "one")
    path = report().save(place / "two")
    write_json(path, {**json.loads(path.read_text()), **change})
    check_refused(["compare", "one", "two", "--output", "out"], place, capsys)


@pytest.mark.parametrize("line", ['{"step": 1, "variance": [1.0]}', '{"step": "1"}', "[]", "{}", '{"step": 1'])
def test_histories(line, place, capsys):
    header = {"format": 1, "model": "m", "layers": 2, "settings": {}}
    (place / "history.jsonl").write_text(json.dumps(header) + "\n" + line + "\n")
    check_refused(["history", "history.jsonl", "--output", "out"], place, capsys, "history.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [True]},
        {"layers": [9]},
        {"layers": [1, 1]},
        {"costs": [1.0]},
        {"protected": [-1]},
        {"candidates": {"a": {"layers": [1]}}},
        {"candidates": {"a": {"layers": [1], "loss": "low", "maps": 0}}},
        {"parameters": [10**12] * 4},
    ],
)
def test_plans(change, place, capsys):
    content = json.loads((FILES / "0.1" / "plans" / "depth.json").read_text())
    write_json(place / "plan.json", {**content, **change})
    arguments = ["drop-layers", "model", "--text", "text.txt", *QUICK, "--no-plots", "--output", "out"]
    check_refused([*arguments, "--plan", "plan.json"], place, capsys)


@pytest.mark.parametrize(
    "name, content", [("nul.txt", b"one\0two"), ("nul.csv", b"text\none\0two\n"), ("latin.txt", b"\xff")]
)
def test_texts(name, content, place, capsys):
    (place / name).write_bytes(content)
    arguments = ["diagnose", "model", "--text", name, *QUICK, "--no-plots", "--output", "out"]
    check_refused(arguments, place, capsys, name)


def test_a_text_whose_last_row_is_cut_off(place, capsys):
    """datasets logs what it raises, too."""
    (place / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + '{"text": "one tw')
    logged = io.StringIO()
    handler, logger = logging.StreamHandler(logged), logging.getLogger("datasets")
    logger.addHandler(handler)
    try:
        arguments = ["diagnose", "model", "--text", "text.jsonl", *QUICK, "--no-plots", "--output", "out"]
        check_refused(arguments, place, capsys, "text.jsonl")
    finally:
        logger.removeHandler(handler)
    assert not logged.getvalue()


SHAPES = "model.layers.0.mlp.up_proj".removeprefix("model.")


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        "wide",
        {SHAPES: None},
        {SHAPES: {"rank": 10**13}},
        {SHAPES: {"rank": True}},
        {SHAPES: {"rank": "3"}},
        {SHAPES: {"rank": -1}},
        {SHAPES: {"rank": 3, "in_features": 10**13}},
        {SHAPES: {"out_features": 10**13}},
        {SHAPES: {"rank": 3, "sparse": 2}},
        {SHAPES: {"rank": 3, "forward": 2}},
        {"../../x": {"rank": 3}},
        {"layers.0.mlp": {"intermediate_size": 10**13}},
    ],
)
def test_module_shapes(shapes, place, capsys):
    config = place / "factorized" / "config.json"
    write_json(config, {**json.loads(config.read_text()), "module_shapes": shapes})
    arguments = ["diagnose", "factorized", "--text", "text.txt", *QUICK, "--no-plots", "--output", "out"]
    check_refused(arguments, place, capsys, "module_shapes")


@pytest.mark.parametrize(
    "name, change",
    [
        ("quantized", {"double_quant": "yes"}),
        ("quantized", {"compute_dtype": "int8"}),
        ("quantized", {"compute_dtype": 16}),
        ("quantized", {"bits": "3"}),
        ("quantized", {"bits": True}),
        ("quantized", {"block": 64.0}),
        ("quantized", {"skip": "all"}),
        ("quantized", {"modules": []}),
        ("quantized", {"modules": {"a": True}}),
        ("quantized", {"modules": {"../a": 3}}),
        ("quantized", {"extra": 1}),
        ("quantized", {"scores": "text.txt"}),
        ("quantized", {"statistics": "../../etc/x"}),
        ("packed", {"minimum": "half"}),
        ("packed", {"minimum": True}),
        ("packed", {"modules": {"a": -1}}),
        ("packed", {"modules": None}),
        ("packed", {"install": 3}),
        ("packed", {"extra": 1}),
    ],
)
def test_quantization_configs(name, change, place, capsys):
    config = place / name / "config.json"
    content = json.loads(config.read_text())
    write_json(config, {**content, "quantization_config": {**content["quantization_config"], **change}})
    check_refused(
        ["diagnose", name, "--text", "text.txt", *QUICK, "--output", "out"], place, capsys, next(iter(change))
    )


@pytest.mark.parametrize("file, content", [("settings.json", "[]"), ("settings.json", '{"a": 1, "a": 2}')])
def test_directories_of_runs(file, content, place, capsys):
    (place / "out").mkdir()
    (place / "out" / file).write_text(content)
    arguments = ["finetune", "model", "--text", "text.txt", "--steps", "1", "--no-plots", "--output", "out"]
    check_refused(arguments, place, capsys, file)


def test_journals(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "journal.jsonl").write_text('{"mine": 1}\n')
    arguments = ["diagnose", "model", "--text", "text.txt", *QUICK, "--no-plots", "--output", "out"]
    check_refused(arguments, place, capsys, "journal.jsonl")


@pytest.mark.parametrize("module", ["/etc/passwd.X", "../../x.X", "a/b.X"])
def test_names_of_code_that_are_paths(module, place, capsys):
    config = place / "model" / "tokenizer_config.json"
    write_json(config, {**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": [module, None]}})
    check_refused(["convert", "lns", "model", "out"], place, capsys, "auto_map")


COMMANDS_THAT_SAVE = {
    "prune": ["prune", "model", "--text", "text.txt", *QUICK],
    "drop-layers": ["drop-layers", "model", "--text", "text.txt", *QUICK, "--n-removed", "1"],
    "drop-experts": ["drop-experts", "mixture", "--text", "text.txt", *QUICK],
    "repeat-layers": ["repeat-layers", "model", "--text", "text.txt", *QUICK, "--start", "1", "--end", "2"],
    "pack": ["pack", "model"],
    "finetune": ["finetune", "model", "--text", "text.txt", "--sequence-length", "8", "--steps", "1", "--no-plots"],
    "heal": [*BY_SCORES["heal"][:-1], "--sequence-length", "8", "--no-plots"],
}


@pytest.mark.parametrize("command", COMMANDS_THAT_SAVE)
def test_an_adapter_beside_a_model(command, place, capsys):
    """transformers adds it to the weights, and saves the adapter alone."""
    peft = pytest.importorskip("peft")
    name = {"heal": "factorized", "drop-experts": "mixture"}.get(command, "model")
    base = AutoModelForCausalLM.from_pretrained(place / name, trust_remote_code=True)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / name)
    (place / name / "README.md").unlink()
    status = main([*COMMANDS_THAT_SAVE[command], "--output", "out"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status == 2 and "model: expected a directory without an adapter, got adapter_config.json" in line
    assert not (place / "out" / "report.json").exists() and not (place / "out" / "config.json").exists()
    if command == "prune":
        assert main(["diagnose", "model", "--text", "text.txt", *QUICK, "--no-plots", "--output", "measured"]) == 0
        assert "the adapter in 'model' is added to its weights" in capsys.readouterr().err


def test_what_is_whole_is_taken(place, capsys):
    """The same files, unchanged: so the refusals above are of what was changed."""
    model = build("llama")
    counts = [sum(p.numel() for n, p in layer.named_parameters() if p.dim() == 2) for layer in model.model.layers]
    LayerScores("m", "owl", [0.4, 0.3, 0.2, 0.1], counts).save(place / "scores.json")
    assert main([*BY_SCORES["quantize"], "scores.json", "--bits", "7", "--no-plots", "--output", "out"]) == 0
    for name in ("factorized", "packed", "quantized"):
        assert main(["diagnose", name, "--text", "text.txt", *QUICK, "--no-plots", "--output", f"of-{name}"]) == 0


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "llama", "architectures": [5]}'])
def test_damaged_configs(content, place, capsys):
    config = place / "model" / "config.json"
    config.write_text(content)
    check_refused(["score", "model", "--text", "text.txt", *QUICK], place, capsys, "config.json")
    check_refused(["convert", "lns", "model", "out"], place, capsys, "config.json")
    report().save(place / "model")
    check_refused(["card", "model"], place, capsys, "config.json")


# Path in the output directory -> contents of somebody else, None for a directory.
FOREIGN = {
    "journal.jsonl": "dear diary...\n2026 was long\n",
    "report.json": '{"mine": 1}',
    "report.md": "# My report\n",
    "report.json/": None,
    "report.md/": None,
    "journal.jsonl/": None,
}
OF_DIAGNOSE = {"report.html": "<p>mine", "overview.png": "mine", "layer_drop.svg": "mine"}
OF_SCORE = {
    "score.png": "mine",
    "scores.json": "[1, 2]",
    "statistics.safetensors": "mine",
    "scores.json/": None,
    "score.png/": None,
}


@pytest.mark.parametrize(
    ("command", "name"),
    [*(("diagnose", name) for name in FOREIGN | OF_DIAGNOSE), *(("score", name) for name in FOREIGN | OF_SCORE)],
)
def test_files_of_others_with_names_of_results_are_kept(command, name, place, capsys):
    path, content = place / "out" / name, (FOREIGN | OF_SCORE | OF_DIAGNOSE)[name]
    (place / "out").mkdir()
    path.mkdir() if content is None else path.write_text(content)
    arguments = [command, "model", "--text", "text.txt", "--output", "out", *QUICK]
    check_refused(arguments, place, capsys, f"out/{name}".rstrip("/"))


@pytest.mark.parametrize("name", ["compare.md", "compare.html", "compare.png"])
def test_files_of_others_with_names_of_a_comparison_are_kept(name, place, capsys):
    report().save(place / "one")
    (place / "out").mkdir()
    (place / "out" / name).write_text("# mine")
    check_refused(["compare", "one", "one", "--output", "out"], place, capsys, f"out/{name}")
    (place / "out" / name).unlink()
    for _ in range(2):  # an earlier comparison is replaced
        assert main(["compare", "one", "one", "--output", "out", "--quiet"]) == 0


def test_a_foreign_journal_in_python_is_kept(place):
    (place / "out").mkdir()
    (place / "out" / "journal.jsonl").write_text("dear diary...\n")
    model = build("llama")
    with pytest.raises(ValueError, match=r"journal: expected \[work, key, result\] in each line, got"):
        diagnose(model, batches=two_batches(model), output=place / "out")
    assert (place / "out" / "journal.jsonl").read_text() == "dear diary...\n"


@pytest.mark.parametrize("value", ["x", True, -1, [8]])
def test_a_wrong_length_in_a_tokenizer_config(value, place, capsys):
    path = place / "model" / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), "model_max_length": value})
    arguments = ["score", "model", "--text", "text.txt", "--output", "out", *QUICK]
    check_refused(arguments, place, capsys, "model_max_length", repr(value))
