"""Options of every command: their spelling, config files, completion; help that waits for nothing."""

import re
import subprocess
import sys
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Literal

import pytest
import yaml

from hf_cod.cli.commands import diagnose, finetune, narrow, prune
from hf_cod.cli.main import COMMANDS, main
from hf_cod.cli.option_groups import GROUPS
from hf_cod.cli.option_names import ELSEWHERE
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.report import RunReport
from hf_cod.scoring.methods import score_layers
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

# Options of every command, whose texts say what happens without them.
COMMON = ("help", "config", "print_config", "quiet", "debug")
QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2", "--no-plots"]


@dataclass
class Options:
    rate: float = field(default=0.5, metadata={"help": "a share, in 10 % steps"})
    steps: int | None = None
    names: list[str] = field(default_factory=list)
    kind: Literal["a", "b"] = "a"
    plots: bool = True
    loud: bool = False


def parse(*arguments):
    parser = SettingsParser([Options], prog="x")
    parser.add_argument("model")
    return parser.parse(arguments, inputs=False)


def test_help_imports_neither_torch_nor_transformers():
    """Of all commands, in one process; their parsers are what help, completion and config files need."""
    code = (
        "import sys, contextlib, io\n"
        "from hf_cod.cli.main import COMMANDS, main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main([]), main(['--version']), main(['--print-completion', 'bash'])\n"
        "    for name in COMMANDS:\n"
        "        with contextlib.suppress(SystemExit): main([name, '--help'])\n"
        "        with contextlib.suppress(SystemExit): main([name, '--print-config'])\n"
        "slow = {'torch', 'transformers', 'numpy', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_by_dashes_underscores_and_other_tools_names():
    assert parse("m", "--rate", "1")[0] == parse("--rate=1.0", "m")[0] == Options(rate=1.0)
    settings, rest = parse("m", "--no_plots", "--names", "a", "b", "--loud", "--steps=3")
    assert settings == Options(steps=3, names=["a", "b"], plots=False, loud=True) and rest.model == "m"
    with pytest.raises(ValueError, match="kind: expected one of a, b, got 'c'"):
        parse("m", "--kind", "c")
    with pytest.raises(SystemExit):
        parse("m", "--rat", "1")  # no abbreviations: a new option would change what they mean


def test_options_of_an_earlier_version_are_taken_with_a_warning(tmp_path):
    """On the command line and in a file; `hf-cod` shows the warning, which Python hides."""
    told = "--parameters is now called --parameter-share"
    file = tmp_path / "run.yaml"
    file.write_text("parameters: 0.6\n")
    for arguments in (["m", "--parameters", "0.6"], ["m", "--parameters=0.6"], ["m", "--config", str(file)]):
        with pytest.warns(DeprecationWarning, match=told):
            *_, found = narrow.make_parser().parse(arguments)
        assert found.parameter_share == 0.6
    with pytest.warns(DeprecationWarning, match="--multiple is now called --channel-multiple"):
        assert narrow.make_parser().parse(["m", "--multiple", "8"])[-1].channel_multiple == 8
    shown = subprocess.run(
        [sys.executable, "-m", "hf_cod", "narrow", "m", "--parameters", "1.5"], capture_output=True, text=True
    )
    assert shown.returncode == 2 and f"hf-cod narrow: warning: option: {told}" in shown.stderr
    assert "parameter_share: expected a share above 0 and at most 1, got 1.5" in shown.stderr


EARLIER = {
    "factorize m --score owl --rank 0.3": "full_rank_share",
    "factorize m --method oats --rank_share 0.3": "factor_share",
    "drop-layers m --layers 2": "n_removed",
    "pack m --minimum 0.3": "min_sparsity",
    "fit m --bits 3 --verify 2": "n_verified",
    "prune m --recover 2": "recover_steps",
    "heal m --teacher t --text t --labels 0.5": "label_weight",
    "heal m --teacher t --text t --hidden 0.5": "hidden_weight",
}


@pytest.mark.parametrize("command", EARLIER)
def test_each_earlier_name_is_taken(command, tmp_path):
    name, *words, option, value = command.split()
    (tmp_path / "run.yaml").write_text(f"{option[2:]}: {value}\n")
    for given in ([option, value], ["--config", str(tmp_path / "run.yaml")]):
        parser = import_module(f"hf_cod.cli.commands.{name.replace('-', '_')}").make_parser()
        with pytest.warns(DeprecationWarning, match=f"is now called --{EARLIER[command].replace('_', '-')};"):
            *_, found = parser.parse([*words, *given])
        assert str(getattr(found, EARLIER[command])) == value


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_an_earlier_name_is_unknown_to_commands_that_never_had_it(capsys):
    with pytest.raises(SystemExit):
        diagnose.make_parser().parse(["m", "--parameters", "0.3"])
    assert "unrecognized arguments: --parameters" in capsys.readouterr().err
    assert finetune.make_parser().parse(["m", "--text", "t", "--rank", "16"])[-1].rank == 16


def test_home_is_meant_by_a_tilde_wherever_a_path_is_given(tmp_path, monkeypatch):
    """Also where no shell expands it: behind an equals sign and in a config file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("names: [~/b, c~]\n")
    settings, rest = parse("~/m", "--config", "~/run.yaml")
    assert settings.names == [f"{tmp_path}/b", "c~"] and rest.model == f"{tmp_path}/m"
    assert parse("m", "--config=~/run.yaml", "--names=~/d")[0].names == [f"{tmp_path}/d"]


def test_paths_of_a_command_in_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 40)
    score_layers(model, method="random", seed=3).save(tmp_path / "scores.json")
    paths = ["~/model", "--text=~/text.txt", "--eval-text=~/text.txt", "--scores=~/scores.json", "--output=~/out"]
    assert main(["prune", *paths, *QUICK, "--no-baseline", "--quiet"]) == 0
    report = RunReport.load(tmp_path / "out")
    assert report.settings["score"] == "random" and report.settings["scores"] == str(tmp_path / "scores.json")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "given, told",
    [
        (["--stepps", "3"], "unrecognized arguments: --stepps 3; did you mean --steps?"),
        (["--rates=1", "--nmaes", "a"], "--rates=1 --nmaes a; did you mean --rate, --names?"),
        (["--no-plot"], "unrecognized arguments: --no-plot; did you mean --no-plots?"),
        (["--max-steps", "3"], "unrecognized arguments: --max-steps 3; did you mean --steps?"),
        (["--xyzzy"], "unrecognized arguments: --xyzzy\n"),
        (["n"], "unrecognized arguments: n\n"),
        ([""], "unrecognized arguments: \n"),
    ],
)
def test_an_unknown_option_brings_the_nearest_one(given, told, capsys):
    with pytest.raises(SystemExit) as done:
        parse("m", *given)
    assert done.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("given, meant", ELSEWHERE.items())
def test_options_of_other_tools_bring_ours(given, meant, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "m", given, "3"])
    assert f"unrecognized arguments: {given} 3; did you mean {meant}?" in capsys.readouterr().err


def test_a_config_file_gives_defaults_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: mine\nrate: 1\nsteps: 7\nnames: [a]\nplots: false\nloud: true\n")
    settings, rest = parse("--config", str(file))
    assert settings == Options(1.0, 7, ["a"], "a", False, True) and rest.model == "mine"
    settings, rest = parse("other", "--config", str(file), "--steps", "8")
    assert settings.steps == 8 and settings.rate == 1 and rest.model == "other"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_boolean_says_what_its_first_form_does(name, capsys):
    """A text stands at `--X, --no-X` or at `--X`, never at `--no-X` alone, which does the opposite."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("\noptions:")[2]
    both = re.findall(r"^  --([a-z-]+), --no-\1\b", shown, re.MULTILINE)
    actions = import_module(f"hf_cod.cli.commands.{COMMANDS[name][0]}").make_parser()._actions
    assert both == [action.option_strings[0][2:] for action in actions if isinstance(action, BooleanOptionalAction)]
    assert not re.search(r"^  --no-", shown, re.MULTILINE)
    assert " ".join(shown.split()).count("(default: on)") == len(both)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_a_first_run_needs(name, capsys):
    """One line of usage with what is required, at most a dozen options, and the others below, each in one group."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    usage, *sections = shown.split("\n\n")
    assert usage.startswith(f"usage: hf-cod {name} [options]") and "\n" not in usage
    assert ("--teacher TEACHER" in usage) == (name == "heal") and ("model" in usage) == ("\n  model " in shown)
    listed = {
        section.partition(":\n")[0]: re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", section, re.M) for section in sections
    }
    groups = [title for title, options in listed.items() if options]
    assert groups[0] == "options" and groups[-1] == "common options"
    assert groups[1:-1] == [title for title in GROUPS if title in groups[1:-1]]
    assert len(listed["options"]) <= 14 and {"text", "output"} & {*listed["options"]} | {name} & {"env", "pack"}
    parser = import_module(f"hf_cod.cli.commands.{COMMANDS[name][0]}").make_parser()
    for found in (f for each in parser.settings for f in fields(each) if f.init):
        titles = [title for title, names in GROUPS.items() if found.name in names]
        assert len(titles) == 1 and found.name.replace("_", "-") in listed[titles[0]], "give it one group"


def test_groups_of_options_name_none_that_is_no_more():
    parsers = [import_module(f"hf_cod.cli.commands.{module}").make_parser() for module, _ in COMMANDS.values()]
    known = {name for parser in parsers for name in parser._options()}
    assert {name for names in GROUPS.values() for name in names} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_option_says_its_default_and_its_effect(name):
    """In words or by a number; that there is none, where one of several is required."""
    module = import_module(f"hf_cod.cli.commands.{COMMANDS[name][0]}")
    for action in module.make_parser()._actions:
        told = action.help or ""
        if told == SUPPRESS:
            continue
        assert len(told.split()) > 1, action.dest
        if action.option_strings and not action.required and action.dest not in COMMON:
            assert "default" in told, f"{name} {action.option_strings[0]}: {told}"
            assert told.count("(default: ") <= 1, f"{name} {action.option_strings[0]}: {told}"


@pytest.mark.parametrize("written, option", [("plots: false", "--plots"), ("loud: true", "--no-loud")])
def test_a_boolean_of_a_config_file_is_overridden_either_way(tmp_path, written, option):
    file = tmp_path / "run.yaml"
    file.write_text(written)
    assert parse("m", "--config", str(file))[0] != Options()
    assert parse("m", "--config", str(file), option)[0] == Options()


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "rates: 1",
            "config: did you mean rate\\? expected an option, got 'rates' in .*",
        ),
        ("rate: fast", "rate: expected a number, got 'fast' in .*run.yaml"),
        ("steps: 1.5", "steps: expected a whole number, got '1.5' in .*run.yaml"),
        ("steps: true", "steps: expected a whole number, got True"),
        ("plots: 1", "plots: expected true or false, got '1'"),
        ("names: a", "names: expected a list, got 'a'"),
        ("kind: c", "kind: expected one of a, b, got 'c'"),
        ("rate: [1]", "rate: expected one value, got"),
        ("- 1", "config: expected option names with values"),
        ("a: [", "config: expected YAML, got .*run.yaml"),
        ("[" * 9999, "config: expected YAML, got .*run.yaml"),
        ("steps: 1\nsteps: 2", "config: expected YAML, got the name 'steps' twice in .*run.yaml"),
        ("steps: 2026-13-01", "steps: expected a whole number, got '2026-13-01'"),
        ("steps: 1:30", "steps: expected a whole number, got '1:30'"),
        ("steps: 0x10", "steps: expected a whole number, got '0x10'"),
        ("rate: 1:30.5", "rate: expected a number, got '1:30.5'"),
        ("steps: !!int five", "config: expected YAML, got .*run.yaml"),
        (None, "config: expected a file, got .*run.yaml', which does not exist$"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("m", "--config", str(tmp_path / "run.yaml"))


def test_numbers_in_a_config_file_are_those_of_the_command_line(tmp_path):
    """YAML 1.1 has octal numbers, and numbers of base 60."""
    (tmp_path / "run.yaml").write_text("steps: 010\nrate: 1e-3\nnames: [0123456, 2026-01-01, 1:30, 1e3]\n")
    settings = parse("m", "--config", str(tmp_path / "run.yaml"))[0]
    assert (
        settings == parse("m", "--steps", "010", "--rate", "1e-3", "--names", "0123456", "2026-01-01", "1:30", "1e3")[0]
    )
    assert settings == Options(0.001, 10, ["0123456", "2026-01-01", "1:30", "1e3"])


@pytest.mark.parametrize("arguments", [["m", "--names", "a", ""], ["m", "--names="], [""]])
def test_an_empty_value_is_refused(arguments):
    """A variable of the shell that is not set: the default would be used instead."""
    name = "names" if len(arguments) > 1 else "model"
    with pytest.raises(ValueError, match=f"{name}: expected a value, got an empty one"):
        parse(*arguments)


def test_an_option_twice_in_two_spellings(tmp_path):
    (tmp_path / "run.yaml").write_text("batch-size: 1\nbatch_size: 2\n")
    with pytest.raises(ValueError, match=r"config: expected each option once, got 'batch_size' twice in .*run\.yaml"):
        narrow.make_parser().parse(["m", "--config", str(tmp_path / "run.yaml")])


def test_a_printed_config_is_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        parse("--rate", "0.25", "--names", "a", "--no-plots", "--print-config")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "# a share, in 10 % steps (default: 0.5)" in shown
    assert yaml.safe_load(shown) == {
        "rate": 0.25, "steps": None, "names": ["a"], "kind": "a", "plots": False, "loud": False, "model": None,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(shown)
    assert parse("m", "--config", str(tmp_path / "run.yaml"))[0] == Options(0.25, None, ["a"], "a", False, False)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_a_config_that_it_reads(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--print-config"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and shown.startswith(f"# hf-cod {name}")
    (tmp_path / "run.yaml").write_text(shown)
    with pytest.raises(SystemExit) as done:
        main([name, "--config", str(tmp_path / "run.yaml"), "--print-config"])
    assert done.value.code == 0 and capsys.readouterr().out == shown


def test_the_nearest_name_of_an_unknown_key_is_an_option(tmp_path, capsys):
    """Not a positional argument: quantize has a model and no method."""
    (tmp_path / "run.yaml").write_text("metod: wanda\n")
    assert main(["quantize", "m", "--config", str(tmp_path / "run.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "got 'metod'" in shown and "did you mean model" not in shown


def test_defaults_in_a_config_are_not_given(tmp_path, capsys):
    """A printed config has all options; owl's threshold in it, unlike one that was given, allows a scores file."""
    with pytest.raises(SystemExit):
        main(["prune", "--print-config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    _, _, settings, *_ = prune.make_parser().parse(["--config", str(tmp_path / "run.yaml"), "model"])
    settings.check_scored("scores.json")
    assert settings.score == "angular"
    _, _, settings, *_ = prune.make_parser().parse(["model", "--threshold", "5"])
    assert settings.score == "owl"
    with pytest.raises(ValueError, match="threshold: expected none with scores"):
        settings.check_scored("scores.json")


def test_a_command_runs_from_a_config_quietly_and_by_other_tools_names(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 40)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"model": str(tmp_path / "model"), "text": str(tmp_path / "text.txt"), "sparsity": 0.25})
    )
    arguments = ["prune", "--config", str(tmp_path / "run.yaml"), "--score", "uniform", *QUICK]
    assert main([*arguments, "--output_dir", str(tmp_path / "out"), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""
    assert RunReport.load(tmp_path / "out").results["sparsity"] == pytest.approx(0.25, abs=1e-2)


@pytest.mark.parametrize("shell, word", [("bash", "complete -o"), ("zsh", "#compdef hf-cod"), ("fish", "complete -c")])
def test_completion_knows_commands_and_options(shell, word, capsys):
    assert main(["--print_completion", shell]) == 0
    shown = capsys.readouterr().out
    assert word in shown and "drop-layers" in shown and "sequence-length" in shown


def test_completion_of_an_unknown_shell(capsys):
    assert main(["--print-completion", "cmd"]) == 2
    assert "--print-completion: expected one of bash, zsh," in capsys.readouterr().err


def test_env_names_what_a_bug_report_needs(capsys):
    assert main(["env"]) == 0
    shown = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["transformers"][0].isdigit() and "cores" in shown["cpu"] and shown["gpu"] and shown["hf_cod"]
