"""Every `hf-cod` command of README and the pages: its own parser takes it, and on a tiny model it works."""

import importlib
import re
import shutil
from contextlib import suppress

import pytest
import yaml

from hf_cod.cli.main import COMMANDS, COMPRESSING, main
from hf_cod.scoring.settings import ScoreSettings
from tests.docs.pages import NAMES, ROOT, commands
from tests.docs.tiny import save_models, write_texts

QUICK = {"--sequence-length": "16", "--max-samples": "4", "--batch-size": "2", "--eval-samples": "4"}
TRAINING = {"--batch-size": "2", "--micro-batch-size": "2", "--sequence-length": "16", "--eval-samples": "4"}
# Of methods that sample layers.
SAMPLED = {"--n-active": "1", "--interval": "1", "--rank": "8"}
# Command -> small values of its options: they replace those of the pages, or are added.
SMALL = {
    "diagnose": {"--sequence-length": "16", "--max-samples": "4", "--batch-size": "2"},
    "score": {"--sequence-length": "16", "--max-samples": "4", "--batch-size": "2"},
    "prune": QUICK,
    "quantize": QUICK,
    "export": {"--sequence-length": "16", "--max-samples": "4", "--batch-size": "2"},
    "factorize": QUICK,
    "narrow": {**QUICK, "--channel-multiple": "8"},
    "drop-layers": QUICK,
    "repeat-layers": QUICK,
    "drop-experts": QUICK,
    "fit": {**QUICK, "--tuning-samples": "4", "--n-verified": "0"},
    "heal": TRAINING,
    "finetune": TRAINING,
}
# Small values of options where they stand on a page, and options of a command that are added where they do not.
REPLACED = {"--steps": "2", "--tokens": "64", "--lora-rank": "2", "--n-removed": "1", "--max-prompts": "2"}
REPLACED |= {"--max-memory": "64GB"}  # of the whole process, which here holds what other tests have imported
ADDED = {"heal": {"--tokens": "64"}, "finetune": {"--steps": "2"}, "fit": {"--knobs": "rank"}}
# A budget within reach of so small a model.
TOGETHER = {"--bits": "3.6", "--knobs": "bits", "--n-verified": "0"}
# What names its output by its place, not by an option.
BY_PLACE = ("pack", "convert", "card")
# Why a command is parsed and not run here.
NOT_RUN = {
    "^demo": "takes a minute; tests/test_pair.py runs it",
    "^card hf-cod-pretrain": "needs a pre-training run; tests/reporting/test_model_card.py runs it",
    "^export .*--gguf": "needs a GGUF of the model; tests/compression/export/test_deci.py runs it",
    "^convert authors": "needs a checkpoint of the authors; tests/models runs it",
    "^finetune .*--estimate": "measures one pass of each method; tests/cli/commands/test_finetune.py runs it",
}
CASES = [page for page in NAMES if commands(page)]


def parser_of(command):
    return importlib.import_module(f"hf_cod.cli.commands.{COMMANDS[command][0]}").make_parser()


def test_the_overview_names_the_commands_that_measure_speed():
    (sentence,) = re.findall(r"on disk\. ([^.;]*)`--no-speed` skips", (ROOT / "docs/how-to/index.md").read_text())
    measuring = {name for name in COMMANDS if "speed" in parser_of(name)._options()}
    assert {*re.findall(r"`([a-z-]+)`", sentence)} == measuring


def test_the_pages_say_which_command_compresses():
    """The table of the how-to pages has those of `hf-cod --help`, and README names the one to begin with."""
    page = (ROOT / "docs/how-to/index.md").read_text(encoding="utf-8")
    section = page.partition("## Which command compresses?")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| \[`([a-z-]+)`\]", section, re.M)) == COMPRESSING
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "which one you need, use `fit`" in readme and "docs/how-to/index.md#which-command-compresses" in readme


def test_the_page_on_scores_gives_the_defaults_of_the_code():
    """Each command has its own, by the tables; those that do not know what scores are for have the papers'."""
    page = (ROOT / "docs/how-to/score.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \| `([a-z]+)`", page, re.M)
    told = {name: score for names, score in rows for name in re.findall(r"`(\w+)`", names)}
    parsed = {name: parser_of(name).parse(["m"]) for name in ("prune", "factorize", "quantize", "finetune", "score")}
    assert told["prune"] == parsed["prune"][2].score == "angular"
    assert told["quantize"] == parsed["quantize"][2].score
    for name in ("narrow", "factorize"):
        assert f"default: {told[name]}" in " ".join(parser_of(name).format_help().split())
    papers = {parsed["finetune"][2].score, parsed["score"][2].method, ScoreSettings().method}
    assert papers == {"owl"} == {told[name] for name in ("finetune", "heal", "score", "score_layers")}


@pytest.mark.parametrize("page", CASES)
def test_the_parsers_take_them(page, capsys):
    for command, *arguments in commands(page):
        if command.startswith("--"):
            assert command in ("--version", "--print-completion")
            continue
        with suppress(SystemExit):  # --help and --print-config end there; so does an error, which says so
            parser_of(command).parse(arguments, inputs=False)  # earlier commands of the page write them
        assert "error:" not in capsys.readouterr().err, (command, arguments)


def test_all_commands_are_on_pages():
    assert {command for page in CASES for command, *_ in commands(page)} >= COMMANDS.keys()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path, models, monkeypatch):
    """A directory with what the pages name: models, texts, a history."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    shutil.copytree(models / "stock", tmp_path / "my-model")
    (tmp_path / "run").mkdir()
    shutil.copy(ROOT / "tests/earlier_files/0.1/history.jsonl", tmp_path / "run")
    return tmp_path


def small(command, arguments, models, number):
    """The command of a page, with a tiny model and small settings."""
    stock, lns = str(models / "stock"), str(models / "lns")
    names = {
        "google-t5/t5-small": str(models / "t5"),
        "allenai/OLMoE-1B-7B-0924": str(models / "mixture"),
        "MIXTURE": str(models / "mixture"),
        "MODEL": stock,
        "STUDENT": "thin",
        "LNS_MODEL": lns,
        "OUTPUT": f"output-{number}",
        "RUN": "diagnosed",
    }
    arguments = [stock if a.startswith(("Qwen/", "meta-llama/")) else names.get(a, a) for a in arguments]
    options = parser_of(command)._option_string_actions
    given = {name for name in options if name in arguments}
    sampled = not given.issuperset({"--method", "--lora-rank"}) and command in ("heal", "finetune")
    own = {**SMALL.get(command, {}), **(SAMPLED if sampled else {})}
    settings = {**own, **{name: value for name, value in REPLACED.items() if name in given}}
    more = TOGETHER if command == "fit" and "--bits" in given else ADDED.get(command, {})
    in_terminal = command == "report" and not given & {"--html", "--space"}
    output = {} if command in BY_PLACE or in_terminal else {"--output": f"output-{number}"}
    for name, value in {**more, "--text": "my.txt", **output}.items():
        if command == "compare" and "--swap" not in given and name in more | {"--text": ""}:
            continue  # runs are measured
        if name in options and (name not in given or name in TOGETHER):
            settings[name] = value
    for name, value in settings.items():
        if name in given:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, *value.split()]
    return [command, *arguments, *(flag for flag in ("--no-plots", "--no-speed") if flag in options)]


@pytest.mark.parametrize("page", [page for page in CASES if page != "README.md"])
def test_they_work_one_after_another(page, place, models, capsys):
    run(page, models, capsys)


def test_those_of_readme_work(place, models, capsys):
    """Its table names neither outputs nor the runs that commands begin with: they are made before."""
    assert main(small("diagnose", ["MODEL", "--output", "diagnosed"], models, 0)) == 0
    assert main(small("factorize", ["MODEL", "--output", "thin"], models, 0)) == 0
    shutil.copy(ROOT / "tests/earlier_files/0.1/history.jsonl", place / "diagnosed")
    run("README.md", models, capsys)


def run(page, models, capsys):
    for number, (command, *arguments) in enumerate(commands(page), 1):
        if any(re.match(pattern, " ".join([command, *arguments])) for pattern in NOT_RUN):
            continue
        called = [command, *arguments] if command.startswith("--") else small(command, arguments, models, number)
        try:
            status = main(called)
        except SystemExit as end:
            status = end.code
        assert not status, (called, capsys.readouterr().err)


def test_what_print_config_writes_is_read(place, models, capsys):
    """As how-to/index.md says of all commands."""
    with pytest.raises(SystemExit):
        main(["prune", str(models / "stock"), "--print-config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"] == str(models / "stock")
    (place / "run.yaml").write_text(text)
    assert main(small("prune", ["--config", "run.yaml"], models, 0)) == 0
