"""Who is sent what a command wrote: the card beside it loads it, and without hf_cod the error says what it requires."""

import json
import re
import shlex
import shutil
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_cod.cli import recorded
from hf_cod.cli.main import COMMANDS, main
from hf_cod.io.adapters import places
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from tests.earlier_files import checkpoints
from tests.fresh_processes import run_fresh

SAMPLES = ["--max-samples", "4", "--sequence-length", "16", "--batch-size", "2", "--eval-samples", "4", "--no-plots"]
STEPS = ["--steps", "4", "--sequence-length", "16", "--micro-batch-size", "2", "--eval-samples", "4", "--no-plots"]
SAMPLED = ["--n-active", "1", "--rank", "4"]
# Directory -> the command that writes it, and where in it the card lies; {} is the folder of all.
MADE = {
    "pruned": (["prune", "{}/base", *SAMPLES, "--score", "uniform", "--sparsity", "0.6"], "."),
    "factorized": (["factorize", "{}/base", *SAMPLES, "--score", "uniform"], "."),
    "narrowed": (["narrow", "{}/base", *SAMPLES, "--score", "uniform"], "."),
    "shortened": (["drop-layers", "{}/base", *SAMPLES, "--n-removed", "1"], "."),
    "replaced": (["drop-layers", "{}/base", *SAMPLES, "--n-removed", "1", "--replacement", "linear"], "."),
    "quantized": (["quantize", "{}/base", *SAMPLES, "--bits", "3"], "."),
    "fitted": (
        ["fit", "{}/base", *SAMPLES, "--bits", "7", "--knobs", "bits", "--tuning-samples", "2", "--no-speed"],
        ".",
    ),
    "packed": (["pack", "{}/pruned"], "."),
    "healed": (["heal", "{}/pruned", "--teacher", "{}/base", *STEPS, *SAMPLED, "--no-speed"], "."),
    "full": (["finetune", "{}/base", *STEPS, "--method", "full"], "."),
    "lora": (["finetune", "{}/base", *STEPS, "--method", "lora"], "adapter"),
    "owlore": (
        ["finetune", "{}/base", *STEPS, *SAMPLED, "--method", "owlore-peft", "--score", "uniform"],
        "adapter",
    ),
    "on-quantized": (["finetune", "{}/quantized", *STEPS, "--method", "lora"], "."),
    "lns": (["convert", "lns", "{}/base", "{}/lns"], "."),
    "stock": (["convert", "stock", "{}/lns", "{}/stock"], "."),
}
ONLY_HERE = ("quantized", "fitted", "packed", "owlore", "on-quantized")
ANSWER = """
import torch
with torch.no_grad():
    torch.save(model.eval()(torch.arange(3, 12)[None]).logits, "logits.pt")
print(len(tokenizer("the dog ran").input_ids))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, and beside it what commands make of it once a test asks for it."""
    folder = tmp_path_factory.mktemp("made")
    model = checkpoints.model_of("llama", **checkpoints.WIDE_SIZES, **checkpoints.TEXT_SIZES)
    model.save_pretrained(folder / "base")
    checkpoints.tokenizer().save_pretrained(folder / "base")
    (folder / "text.txt").write_text(checkpoints.text())
    (folder / "hidden").mkdir()
    (folder / "hidden" / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    return folder


def place(folder, name):
    """Where the card is of what a command has made."""
    words, inside = MADE[name]
    if not (folder / name).exists():
        for other in MADE:
            if f"{{}}/{other}" in words and other != name:
                place(folder, other)
        arguments = [word.format(folder) for word in words]
        if words[0] not in ("convert", "pack"):
            arguments += ["--text", str(folder / "text.txt")]
        if words[0] != "convert":
            arguments += ["--output", str(folder / name)]
        assert main(arguments) == 0
    return folder / name / inside


def lines_of(card: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)
    return found


@torch.no_grad()
def expected(folder, name):
    directory = place(folder, name)
    if not (directory / "adapter_config.json").is_file():
        return load_model(str(directory))[0](torch.arange(3, 12)[None]).logits
    base = load_model(MADE[name][0][1].format(folder))[0]
    return PeftModel.from_pretrained(base, directory).eval()(torch.arange(3, 12)[None]).logits


@pytest.mark.process
@pytest.mark.parametrize("name", MADE)
def test_the_lines_of_a_card_load_what_it_is_about(name, folder):
    lines = lines_of(place(folder, name) / "README.md")
    assert ("import hf_cod" in lines) == (name in ONLY_HERE)
    hidden = [] if name in ONLY_HERE else [folder / "hidden"]
    cache = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = run_fresh(lines + ANSWER, cwd=folder, paths=hidden, environment=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(folder / "logits.pt"), expected(folder, name))
    assert done.stdout.split()[-1] == "3"


@pytest.mark.process
@pytest.mark.parametrize("name", ONLY_HERE)
def test_without_hf_cod_the_first_line_says_what_is_required(name, folder):
    lines = lines_of(place(folder, name) / "README.md").replace("import hf_cod", "import json")
    options = {"cwd": folder, "paths": [folder / "hidden"], "environment": {"HF_HUB_OFFLINE": "1"}}
    for code in (lines, lines.replace('")', '", trust_remote_code=True)')):
        if "peft" in code and code != lines:
            continue  # PEFT knows no remote code
        done = run_fresh(code, **options)
        assert done.returncode != 0
        (error,) = re.findall(r"^(?:ValueError|KeyError): .*", done.stderr, re.M)[-1:]
        assert "requires hf_cod: pip install hf_cod" in error
    assert "delete the quantization_config" not in done.stderr


@pytest.mark.parametrize("name", MADE)
def test_a_card_says_how_it_was_made(name, folder):
    directory = place(folder, name)
    card, command = ModelCard.load(directory / "README.md"), MADE[name][0][0]
    assert {"hf_cod", command} <= set(card.data.tags) and card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == ("peft" if (directory / "adapter_config.json").is_file() else "transformers")
    assert card.data.base_model is None, "a directory is no Hub id"
    assert f"hf-cod {command} " in card.text and str(folder.parent) not in card.content
    (install,) = re.findall(r"^pip install .*$", card.text, re.M)
    assert ("hf_cod" in install) == (name in ONLY_HERE) and re.search(r"(hf_cod.*|transformers)>=\d", install)
    assert RunReport.load(folder / name).summary[0].split()[0] in card.text


@pytest.mark.parametrize("name", MADE)
def test_the_model_is_in_the_output_directory_itself(name, folder):
    """Of each command alike; adapters take its place where they cannot be merged, and else lie beside it."""
    place(folder, name)
    there = [str(found.relative_to(folder / name)) for found in places(folder / name)]
    assert there == {"lora": [".", "adapter"], "owlore": [".", "adapter"]}.get(name, ["."])
    assert (folder / name / "config.json").is_file() == (name != "on-quantized")


@pytest.mark.parametrize(
    "name, inside", [("lora", ""), ("lora", "adapter"), ("owlore", "adapter"), ("on-quantized", "")]
)
def test_commands_take_the_directory_of_an_adapter(name, inside, folder, tmp_path, capsys):
    """The output directory itself, and the adapter in it: what is measured is the base with the adapter."""
    place(folder, name)
    made = folder / name / inside
    assert main(["card", str(made)]) == 0
    with torch.no_grad():
        logits = load_model(str(made))[0](torch.arange(3, 12)[None]).logits
    torch.testing.assert_close(logits, expected(folder, name), atol=1e-4, rtol=1e-4)
    measured = tmp_path / "measured"
    text = ["--text", str(folder / "text.txt"), "--sequence-length", "8", "--max-samples", "4", "--no-plots"]
    assert main(["diagnose", str(made), *text, "--output", str(measured)]) == 0
    assert RunReport.load(measured).n_layers == checkpoints.WIDE_SIZES["num_hidden_layers"]
    assert main(["compare", str(measured), str(measured), "--no-plots", "--output", str(tmp_path / "compared")]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder / name), str(measured), "--output", str(tmp_path / "no")]) == 2
    assert "got one of finetune (" in (error := capsys.readouterr().err) and "hf-cod diagnose first" in error


def test_other_commands_refuse_an_adapter_that_cannot_be_merged(folder, tmp_path, capsys):
    made = str(place(folder, "on-quantized"))
    assert main(["prune", made, "--text", str(folder / "text.txt"), "--output", str(tmp_path / "no")]) == 2
    assert f"model: expected a model, got an adapter on a quantized base in {made!r}" in capsys.readouterr().err


def excluded_by_the_page() -> list[str]:
    return re.findall(r"--exclude (\S+)", (Path("docs") / "how-to" / "share.md").read_text(encoding="utf-8"))


def test_the_page_excludes_no_file_that_loading_reads(folder):
    required = {file.name for file in (folder / "base").iterdir()} | {"adapter_config.json"}
    assert not [name for name in required for pattern in excluded_by_the_page() if fnmatch(name, pattern)]


@pytest.mark.parametrize("name", MADE)
def test_what_the_page_excludes_has_all_paths_of_the_machine(name, folder):
    place(folder, name)
    files = {str(file.relative_to(folder / name)): file for file in (folder / name).rglob("*") if file.is_file()}
    holding = {path for path, file in files.items() if str(folder).encode() in file.read_bytes()}
    assert "report.json" in holding, "the base is named by its whole path"
    for path in holding - {found for found in files for pattern in excluded_by_the_page() if fnmatch(found, pattern)}:
        config = json.loads(files[path].read_text(encoding="utf-8"))
        assert files[path].name == "adapter_config.json" and config.pop("base_model_name_or_path")
        assert str(folder) not in json.dumps(config), "the page says which entry to change"


def command_of(directory: Path) -> list[str]:
    """The words of the command, which all cards of a run have."""
    texts = [card.read_text(encoding="utf-8") for card in directory.rglob("README.md")]
    (command,) = {found for text in texts for found in re.findall(r"```sh\n(hf-cod .*?)\n```", text)}
    return shlex.split(command)[1:]


def settings_of(words):
    """Module of the command, and the settings without those of outputs, defaults filled in."""
    module = import_module(f"hf_cod.cli.commands.{COMMANDS[words[0]][0]}")
    *settings, rest = module.make_parser().parse(words[1:])
    found = {}
    for each in settings:
        found |= each.resolved() if hasattr(each, "resolved") else asdict(each)
    positionals = {name: getattr(rest, name) for name in ("model", "student", "source", "to") if hasattr(rest, name)}
    return {**found, **positionals, "plots": True, "output": None}


@pytest.mark.parametrize("name", MADE)
def test_the_command_of_a_card_has_the_settings_of_the_run(name, folder, monkeypatch):
    place(folder, name)
    monkeypatch.chdir(folder)
    words = command_of(folder / name)
    given = [word.removeprefix("{}/") for word in MADE[name][0]]
    if words[0] not in ("convert", "pack"):
        given += ["--text", "text.txt"]
    if words[0] == "convert":  # whose output has no default
        given += ["--output", "another"]
    assert settings_of(words) == settings_of(given)
    assert {word for word in words if word.startswith("--")} <= set(given), "no option at its default"


LOADED = ["--dtype", "bfloat16", "--device", "cpu", "--trust-remote-code"]
TABLE = ["--text", "table.csv", "--text-column", "words", "--text-split", "train"]
EVAL = ["--eval-text", "table.csv"]
INPUTS = {
    "prune": [*SAMPLES, *LOADED, *TABLE, *EVAL, "--score", "owl", "--threshold", "3", "--per-module"],
    "factorize": [*SAMPLES, *LOADED, *TABLE, "--score", "uniform", "--no-speed"],
    "narrow": [*SAMPLES, *LOADED, *TABLE, "--score", "uniform"],
    "drop-layers": [*SAMPLES, *LOADED, *TABLE, "--n-removed", "1", "--criterion", "angular", "--no-protect"],
    "quantize": [*SAMPLES, *LOADED, *TABLE, "--bits", "3", "--rounding", "nearest"],
    "pack": [*LOADED, "--min-sparsity", "0.4"],
    "heal": [*STEPS, *SAMPLED, *LOADED, *TABLE, *EVAL, "--teacher", "base", "--teacher-dtype", "float32", "--no-speed"],
    "finetune": [*STEPS, *SAMPLED, *LOADED, *TABLE, "--score", "depth", "--batch-size", "4"],
    "prune by scores": [*SAMPLES, *TABLE, "--scores", "scores.json"],
    "factorize by scores": [*SAMPLES, *TABLE, "--scores", "scores.json", "--no-speed"],
    "drop-layers by plan": [*SAMPLES, *TABLE, "--plan", "depth_plan.json", "--no-speed"],
    "heal by scores": [*STEPS[2:], *SAMPLED, *TABLE, "--teacher", "base", "--tokens", "256", "--scores", "scores.json"],
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_command_of_a_card_has_the_settings_of_model_and_text(name, folder, monkeypatch):
    """Those of loading, of a dataset and of the teacher, and nothing that follows from a file or from other options."""
    place(folder, "pruned")
    place(folder, "shortened")
    monkeypatch.chdir(folder)
    Path("table.csv").write_text("words\n" + "".join(f"{line}\n" for line in checkpoints.text().splitlines() if line))
    shutil.copy("pruned/scores.json", ".")
    shutil.copy("shortened/depth_plan.json", ".")
    command, output = name.split()[0], f"{name.replace(' ', '-')}-of-inputs"
    arguments = [command, "pruned" if command in ("pack", "heal") else "base", *INPUTS[name]]
    assert main([*arguments, "--output", output]) == 0
    words = command_of(Path(output))
    assert settings_of(words) == settings_of(arguments)
    assert {word for word in words if word.startswith("--")} <= set(arguments), "no option at its default"


def test_the_command_of_a_card_has_the_revision_of_a_model_of_the_hub():
    report = RunReport("prune", "m", {"model": "me/m", "revision": "v2", "sparsity": 0.5}, {}, {}, {})
    assert recorded.command_of(report) == "hf-cod prune me/m --sparsity 0.5 --revision v2"


def test_a_card_lists_the_main_settings_and_no_defaults_with_their_meaning(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    asked = {"model": "me/m", "sparsity": 0.5, "method": "wanda", "pack": True, "revision": "main", "samples": 3}
    (card,) = recorded.card_outputs(tmp_path, RunReport("prune", "m", asked, {}, {}, {}))
    text = card.read_text()
    assert "| method | wanda | which weights are set to zero. magnitude: " in text and "| sparsity | 0.5 |" in text
    assert "| pack |" not in text and "| revision |" not in text
    assert "| samples | 3 | number of calibration samples |" in text
    (card,) = recorded.card_outputs(tmp_path, RunReport("prune", "m", {**asked, "pack": False}, {}, {}, {}))
    assert "| pack | False | join the texts and cut them" in card.read_text()


def test_control_characters_in_the_command_of_a_card_are_written_for_the_shell():
    report = RunReport("prune", "m", {"model": "me/a\x1b[31m[red]b'\u202ec\\", "sparsity": 0.5}, {}, {}, {})
    assert recorded.command_of(report) == "hf-cod prune $'a\\x1b[31m[red]b\\'\\u202ec\\\\' --sparsity 0.5"


@pytest.mark.parametrize("name", MADE)
def test_card_takes_each_of_them(name, folder):
    readme = place(folder, name) / "README.md"
    before = readme.read_text()
    readme.unlink()
    assert main(["card", str(folder / name)]) == 0
    assert readme.read_text() == before
    assert main(["card", str(readme.parent), "--name", "me/it", "--license", "mit"]) == 0
    card = ModelCard.load(readme)
    assert card.data.license == "mit" and re.search(r'from_pretrained\((base, )?"me/it"', card.text)
    readme.write_text(before)


def test_card_refuses(folder, tmp_path, capsys):
    RunReport("diagnose", "m", {}, {}, {}, {}).save(tmp_path / "other")
    assert main(["card", str(tmp_path / "other")]) == 2
    assert "directory: expected one with a model or an adapter" in capsys.readouterr().err
    readme = place(folder, "pruned") / "README.md"
    before = readme.read_text()
    readme.write_text("mine")
    assert main(["card", str(folder / "pruned")]) == 2
    assert "README.md of other origin" in capsys.readouterr().err and readme.read_text() == "mine"
    readme.write_text(before)
    assert main(["card", str(folder / "pruned"), "--sources", "x"]) == 2
    assert "sources: expected none for a run of prune" in capsys.readouterr().err


def test_a_card_in_a_directory_with_control_characters(folder, tmp_path, capsys):
    directory = tmp_path / "a\x1b[31mb"
    shutil.copytree(place(folder, "pruned"), directory)
    capsys.readouterr()
    assert main(["card", str(directory)]) == 0
    shown = capsys.readouterr()
    assert "a\\x1b[31mb" in shown.out and "\x1b" not in shown.out + shown.err
