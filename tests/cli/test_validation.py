"""Bad settings of every command: one line "field: expected ..., got ...", status 2, and no model was loaded for it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cod.cli.main import COMMANDS, main

# What a command is called with, where MODEL alone is not enough.
POSITIONAL = {
    "demo": [],
    "env": [],
    "compare": ["--swap", "model", "model"],
    "report": ["run"],
    "history": ["run"],
    "card": ["run", "card"],
    "convert": ["authors", "model", "converted", "--norm-type", "post_pre"],
    "heal": ["model", "--teacher", "model"],
    "repeat-layers": ["model", "--search"],
}
# Only a model, a data set or a finished run shows whether these are bad, or any value is good.
FREE = [
    "print_trl",
    "compare model",
    "layers_path",
    "revision",
    "teacher",
    "teacher_revision",
    "trust_remote_code",
    "skip",
    "drop_metric",
    "name",
    "license",
    "language",
    "where",
    "labels",
    "sources",
    "comparison",
    "space",
    "gguf",
    "swap",
]
COUNT, SHARE, POSITIVE = ["0", "-1", "x"], ["-0.1", "1.5", "nan", "x"], ["0", "-1", "nan", "inf", "x"]
FILE = ["none.json", "text.txt"]
# Option -> values that no model takes; of a command alone: "command option".
BAD = {
    **dict.fromkeys(
        ["sequence_length", "max_samples", "batch_size", "micro_batch_size", "eval_samples", "tuning_samples"], COUNT
    ),
    **dict.fromkeys(["max_prompts", "max_new_tokens"], COUNT),
    "tasks": ["none.jsonl", "text.txt", "gym:nothing", "gym:chain_sum,digits=2", "lm-eval:"],
    "diagnose temperature": ["-1", "nan", "inf", "x"],
    **dict.fromkeys(
        ["steps", "lora_rank", "save_every", "log_every", "n_active", "interval", "recover_rank", "n_removed"], COUNT
    ),
    "channel_multiple": COUNT,
    **{key: ["", "(", ".*["] for key in ["include", "exclude"]},
    "seed": ["x", str(10**30)],
    **{key: ["x", "-1", str(2**32)] for key in ["finetune seed", "heal seed"]},
    **dict.fromkeys(
        ["threshold", "passes", "learning_rate", "recover_learning_rate", "scale", "temperature"], POSITIVE
    ),
    **dict.fromkeys(["floor", "min_sparsity", "label_weight"], SHARE),
    **{key: ["0", *SHARE] for key in ["parameter_share", "factor_share", "share"]},
    **{
        key: ["x"]
        for key in [
            "dtype",
            "teacher_dtype",
            "method",
            "experts",
            "score",
            "rounding",
            "criterion",
            "replacement",
            "compensation",
            "expert_basis",
            "token",
        ]
    },
    **{
        key: ["x"]
        for key in [
            "deselected",
            "moments",
            "metrics",
            "knobs",
            "pruner",
            "granularity",
            "plot_format",
            "norm_type",
            "device",
        ]
    },
    **dict.fromkeys(["scores", "statistics", "plan", "chat_template"], FILE),
    **{key: ["none.txt", "./none", "model", "picture.png"] for key in ["text", "eval_text"]},
    **{key: ["x"] for key in ["text_column", "text_split", "text_config"]},  # of the embedded text
    "memory": ["much", "-4GB"],
    "max_memory": ["much", "-4GB", "0"],
    "output": ["text.txt", "taken"],
    "start": ["-1", "x"],
    "end": ["0", "x"],
    "times": ["1", "x"],
    "length": ["0", "x"],
    "sparsity": SHARE,
    "pattern": ["2of4", "4:2", "0:4"],
    "spread": ["-0.1", "nan", "inf", "x", "0.9"],
    "recover_steps": ["-1", "x"],
    "rank": ["-1", "x"],
    "full_rank_share": ["0", *SHARE],
    "target": ["0", "1", "nan", "x"],
    "bits": ["2", "3.05", "8", "nan", "x"],
    "fit bits": ["0", "-1", "nan", "x"],
    "block": ["0", "48", "x"],
    "to": ["onnx"],
    "group_size": ["0", "48", "x"],
    "export bits": ["0", "-1", "nan", "x"],
    "n_verified": ["-1", "x"],
    "tokens": ["0", "many", "-2M"],
    "hidden_weight": ["-1", "nan", "inf", "x"],
    "teacher_layers": ["x", "1"],  # without a hidden_weight
    "max_grad_norm": ["-1", "nan", "inf", "x"],
    "post_layers": ["x"],
    "lns_exponent": ["x", "1.5", "-1"],
    "search_passes": COUNT,
    "rest": ["x"],
    "embedding_bits": ["3", "x"],
    "diagnose output": ["text.txt"],  # these two keep what is there
    "score output": ["text.txt"],
    **{f"{command} output": [] for command in ("compare", "report", "history", "demo")},  # take what is there
}
# Options that depend on one another: a whole command -> its error.
TOGETHER = {
    "prune model --pattern 2:4 --sparsity 0.5": "pattern: expected no sparsity or spread with 2:4",
    "prune model --sparsity 0.9 --spread 0.2": "spread: expected 0..0.1",
    "narrow model --parameter-share 0.9 --spread 0.2": "spread: expected",
    "factorize model --score angular --parameter-share 0.9 --spread 0.2": "spread: expected",
    "factorize model --full-rank-share 0.5 --parameter-share 0.5": "full_rank_share: expected either",
    "factorize model --method plain --score fisher": "score: expected spectrum",
    "quantize model --bits 3.3 --block 32 --no-double-quant": "bits: expected 3, 4, or stored bits",
    "drop-experts model --threshold 3": "threshold: expected none with method reap, which does not use it",
    "drop-layers model --n-removed 2 --parameter-share 0.5": "n_removed: expected either n_removed or parameter_share",
    "repeat-layers model --start 1 --end 2 --search": "search: expected either search, or start and end, got both",
    "fit model": "budget: expected one of --memory, --parameter-share and --bits, got none",
    "heal model --teacher model --tokens 2M --steps 3": "tokens: expected none with steps",
    "finetune model --batch-size 6 --micro-batch-size 4": "micro_batch_size: expected batch_size 6 to be a multiple",
    "finetune model --save-every 10 --log-every 4": "save_every: expected a multiple of log_every",
    "finetune model --fused": "fused: expected micro_batch_size equal to batch_size, 16",
    "finetune model --fused --micro-batch-size 16": "fused: expected max_grad_norm 0",
    "finetune model --method lisa --scores scores.json": "scores: expected none with lisa",
    "finetune model --method owlore-peft --rank 0": "rank: expected at least 1 for owlore-peft",
    "finetune model --method owlore-peft --deselected keep": "deselected: expected none with an OwLore adapter",
    "heal model --teacher model --method owlore-peft --scale 2": "scale: expected none with an OwLore adapter",
    **{
        f"{command} model --scores scores.json {more}": f"{more[2:].split()[0].replace('-', '_')}: expected none with "
        "scores, which are already computed"
        for command in ("prune", "quantize", "narrow", "factorize")
        for more in ("--score angular --threshold 7", "--threshold 5", "--per-module")
    },
    **{
        f"{command} model --score angular {more}": f"{more[2:].split()[0].replace('-', '_')}: expected score owl"
        for command in ("prune", "quantize", "narrow", "factorize")
        for more in ("--threshold 7", "--threshold 5", "--per-module")
    },
    "factorize model --threshold 7": "threshold: expected score owl, which it is a setting of, got the default score",
    "factorize model --scores scores.json --score fisher": "score: expected none with scores",
    "quantize model --bits 3 --scores scores.json": "scores: expected none with bits 3, which uses no scores",
    "quantize model --bits 3 --score owl --threshold 9": "score: expected none with bits 3",
    "quantize model --bits 4 --threshold 9": "threshold: expected none with bits 4",
    "prune model --pattern 2:4 --scores scores.json": "scores: expected none with pattern 2:4",
    "prune model --pattern 2:4 --score angular": "score: expected none with pattern 2:4",
    "convert authors model converted": "norm_type: expected one of",
    "convert stock model converted --norm-type lns": "norm_type: expected none with stock",
    "convert lns model converted --post-layers 2": "post_layers: expected none with lns",
    **{
        f"score model --method {method} {option}": f"{option[2:].split()[0].replace('-', '_')}: expected none with "
        f"method {method}, which does not use it, got "
        for method, option in (
            ("angular", "--threshold 3"),
            ("angular", "--threshold 5"),
            ("sensitivity", "--per-module"),
            ("owl", "--target 0.5"),
            ("uniform", "--pruner magnitude"),
        )
    },
    "diagnose model --metrics output_variance --token all": "token: expected none with metrics other than angular_dist",
    "diagnose model --metrics gradient_norm --drop-metric loss": "drop_metric: expected none with metrics other than",
    "prune model --score uniform --spread 0.1": "spread: expected none with score uniform",
    "factorize model --method oats --spread 0.1": "spread: expected none with score uniform",
    "prune model --recover-rank 4": "recover_rank: expected none with recover_steps 0, which trains nothing, got 4",
    "prune model --recover-learning-rate 1": "recover_learning_rate: expected none with recover_steps 0",
    "finetune model --estimate --plan-only": "plan_only: expected none with estimate",
    "heal model --teacher model --label-weight 1 --temperature 2": "temperature: expected none with label_weight 1",
    **{
        f"{command} {more}": f"{option.replace('-', '_')}: expected none with {told}"
        for command in ("finetune model", "heal model --teacher model")
        for option, more, told in (
            ("score", "--scores scores.json --score angular", "scores, which are already computed, got 'angular'"),
            ("threshold", "--scores scores.json --threshold 13", "scores, which are already computed, got 13"),
            ("threshold", "--score angular --threshold 7", "score angular, which does not depend on it, got 7.0"),
            ("score", "--method full --score angular", "full, which does not sample layers by scores"),
            ("threshold", "--method galore --threshold 7", "galore, which does not sample layers by scores"),
            ("lora-rank", "--lora-rank 8", "owlore, which trains no adapters of LoRA, got 8"),
            ("rank", "--method lora --rank 8", "lora, whose rank is lora_rank, got 8"),
            ("n-active", "--method lora --n-active 2", "lora, which does not use it, got 2"),
            ("fused", "--method full --fused", "full, which does not use it, got True"),
            ("floor", "--method galore --floor 0.5", "galore, which does not use it, got 0.5"),
            ("scale", "--method lisa --scale 2", "full rank, in which updates are not scaled, got 2"),
            ("scale", "--rank 0 --scale 2", "full rank, in which updates are not scaled, got 2"),
            ("passes", "--steps 3 --passes 3", "a number of steps or tokens, got 3.0"),
        )
    },
    "finetune model --method lisa --floor 0.5": "floor: expected 1.0 with lisa, got 0.5",
    "heal model --teacher model --tokens 2k --passes 2": "passes: expected none with a number of steps or tokens",
}


def options():
    """(command, option, its name) of everything that takes a value."""
    for command, (module, _) in COMMANDS.items():
        parser = importlib.import_module(f"hf_cod.cli.commands.{module}").make_parser()
        for name, action in parser._options().items():
            if action.option_strings and action.nargs != 0:
                yield command, action.option_strings[0], name


ALL = list(options())
CASES = [
    (command, option, name, value)
    for command, option, name in ALL
    for value in BAD.get(f"{command} {name}", BAD.get(name, []))
]


@pytest.fixture
def no_model(tmp_path, monkeypatch):
    """A directory with files that are none of what they are taken for; whoever loads a model fails."""

    def never(*args, **kwargs):
        pytest.fail("a model is loaded before the settings are checked")

    # Those that import it first: one that is imported by its patch would keep the patched function for ever.
    for module in ("hf_cod.cli.work", "hf_cod.cli.samples", "hf_cod.io.models"):
        monkeypatch.setattr(f"{module}.load_model", never)
    monkeypatch.setattr("hf_cod.io.models.load_config", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one two three")
    Path("picture.png").write_text("no picture")
    Path("scores.json").write_text("{}")
    for folder in ("model", "taken"):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")


def test_each_option_is_in_the_tables():
    known = {*BAD, *FREE}
    missing = [f"{c} {name}" for c, _, name in ALL if name not in known and f"{c} {name}" not in known]
    assert not missing, "give each a bad value, or say that it has none"
    used = {name for _, _, name in ALL} | {f"{c} {name}" for c, _, name in ALL}
    assert not {*BAD} - used, "options that are no more"


@pytest.mark.parametrize("command, option, name, value", CASES)
def test_bad_values(no_model, capsys, command, option, name, value):
    positional = list(POSITIONAL.get(command, ["model"]))
    if command == "fit" and name not in ("memory", "parameter_share", "bits"):
        positional += ["--bits", "3.3"]
    if option in positional:
        del positional[positional.index(option) :][:2]
    more = ["--score", "angular"] if command == "factorize" and name in ("spread", "full_rank_share") else []
    more += ["--method", "oats"] if command == "factorize" and name == "factor_share" else []
    assert main([command, *positional, *more, f"{option}={value}"]) == 2
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if "error: " in line]
    assert line.startswith(f"hf-cod {command}: error: {name}: expected ") and ", got " in line


@pytest.mark.parametrize("command", TOGETHER)
def test_settings_that_do_not_go_together(no_model, capsys, command):
    assert main(command.split()) == 2
    assert f"error: {TOGETHER[command]}" in capsys.readouterr().err


NOT_THERE = {
    "diagnose ./none": "model: expected a Hub id, a directory or a .gguf file, got './none', which does not exist",
    "finetune runs/models/none": "model: expected a Hub id, a directory or a .gguf file, got 'runs/models/none', which",
    "pack none.gguf": "model: expected a GGUF file, got 'none.gguf', which does not exist",
    "fit text.txt --bits 3.5": "model: expected a directory or a .gguf file, got 'text.txt'; pass the directory",
    "heal ./none --teacher model": "student: expected a Hub id, a directory or a .gguf file, got './none', which",
    "heal model --teacher ./none": "teacher: expected a Hub id, a directory or a .gguf file, got './none', which",
    "convert lns ./none converted": "source: expected a Hub id, a directory or a .gguf file, got './none', which does",
    "finetune model --text none.jsonl": "text: expected a text file or a dataset name, got 'none.jsonl', which does",
    "score model --text picture.png": "text: expected a file that ends in .txt, .md, .text, .json",
    "prune model --eval-text ./none": "eval_text: expected a text file or a dataset name, got './none', which does not",
    "quantize model --scores none": "scores: expected a file, got 'none', which does not exist",
    "score model --statistics taken": "statistics: expected a file of statistics, got 'taken', which is a directory",
    "drop-experts model --plan none.json": "plan: expected a file, got 'none.json', which does not exist",
    "repeat-layers model --plan none.json": "plan: expected a file, got 'none.json', which does not exist",
    "drop-layers model --plan none.json": "plan: expected a file, got 'none.json', which does not exist",
    f"quantize {'m' * 300}": f"model: expected a path, got '{'m' * 20}",
    f"score model --text {'t' * 300}": f"text: expected a path, got '{'t' * 20}",
    "history none": "run: expected a training history of hf_cod, got 'none', which does not exist",
    "history taken": "run: expected a training history of hf_cod, got 'taken', which has no history.jsonl",
    "compare taken none": "runs: expected a directory with a report.json, or such a file, got 'taken', which has no",
    "compare none": "runs: expected a directory with a report.json, or such a file, got 'none', which does not exist",
    "report none": "runs: expected a directory with a report.json, or such a file, got 'none', which does not exist",
    "card none": "directory: expected the output directory of a command, got 'none', which does not exist",
    "card taken": "directory: expected the output directory of a command, got 'taken', which has no report.json",
    "card text.txt": "directory: expected the output directory of a command, got 'text.txt', which is a file",
}


def test_a_wrong_path_is_told_before_torch_is_imported(no_model):
    """In one new process, in which a module that would take seconds must not be imported by any of these commands."""
    code = (
        "import sys\n"
        "from hf_cod.cli.main import main\n"
        "for command in sys.argv[1:]:\n"
        "    assert main(command.split()) == 2, command\n"
        "slow = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *NOT_THERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command, line in zip(NOT_THERE, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"hf-cod {command.split()[0]}: error: {NOT_THERE[command]}")


def test_a_name_that_may_be_on_the_hub_is_no_wrong_path():
    words = ["Qwen/Qwen2.5-0.5B", "--teacher", "gpt2", "--text", "user/texts"]
    *_, found = importlib.import_module("hf_cod.cli.commands.heal").make_parser().parse(words)
    assert found.student == "Qwen/Qwen2.5-0.5B" and found.text == "user/texts"
