"""Python of README and the pages: it compiles, the names of hf_cod in it exist, and it runs on tiny models."""

import ast
import inspect
import re
import textwrap
import typing

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_cod
from tests.docs.pages import NAMES, ROOT, read, snippets
from tests.docs.tiny import SIZES, TEXT, model, save_models
from tests.tiny_models import build

CASES = [(page, number) for page in NAMES for number in range(len(snippets(page)))]
# What is compiled and not run here, and why.
NOT_RUN = {
    '"sensitivities.json"': "needs a file of another tool; tests/scoring/imports reads some",
    "me/my-model": "needs the Hub",
    "hf-cod-quantize-my-model": "needs a directory of a command; CI runs the lines of a card",
    "arc_easy": "needs the Hub; tests/analysis/evaluation runs evaluate_tasks",
    '"cod_qwen3"': "large; tests/models/test_training.py runs it",
}


@pytest.mark.parametrize("page, number", CASES)
def test_it_compiles_and_its_names_exist(page, number):
    tree = ast.parse(snippets(page)[number], page)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_cod":
            assert {alias.name for alias in node.names} <= hf_cod._HOMES.keys(), page
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_cod":
            assert hasattr(hf_cod, node.attr), f"{page}: {node.attr}"


def keywords(function):
    """The names that a public function takes, with the fields of settings; None where it takes any."""
    found = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found.add(parameter.name)
            continue
        fields = typing.get_type_hints(inspect.unwrap(function)).get(parameter.name)
        if typing.get_origin(fields) is not typing.Unpack:
            return None
        found |= typing.get_type_hints(typing.get_args(fields)[0]).keys()
    return found


@pytest.mark.parametrize("page, number", CASES)
def test_its_calls_pass_names_that_functions_take(page, number):
    """Signatures have the current names only, so a deprecated one fails here, also where a snippet is not run."""
    for node in ast.walk(ast.parse(snippets(page)[number], page)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name not in hf_cod._HOMES or (taken := keywords(getattr(hf_cod, name))) is None:
            continue
        assert {keyword.arg for keyword in node.keywords} - {None} <= taken, f"{page}: {name}"


def test_the_check_of_names_knows_settings_and_old_names():
    taken = keywords(hf_cod.evaluate_tasks)
    assert {"tasks", "max_samples"} <= taken and "limit" not in taken


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def measured(models):
    """What readers have from a page before: samples, statistics, scores, reports."""
    tokenizer = AutoTokenizer.from_pretrained(models / "stock")
    settings = hf_cod.SampleSettings(sequence_length=16, max_samples=32, batch_size=8)
    batches = hf_cod.token_batches(tokenizer, TEXT, settings)
    statistics = hf_cod.collect_statistics(model(), batches[:1])
    reports = [
        hf_cod.diagnose(model(), batches=batches[:1], show_progress=False, metrics=["angular_distance"], name=name)
        for name in ("first", "second")
    ]
    return {
        "batches": batches,
        "more_batches": batches[:1],
        "statistics": statistics,
        "scores": hf_cod.score_layers(model(), statistics, method="owl", threshold=2.0),
        "first": reports[0],
        "second": reports[1],
    }


def names(models, measured, folder):
    """What the pages take as given."""
    tokenizer = AutoTokenizer.from_pretrained(models / "stock")
    tokenizer.pad_token = tokenizer.eos_token
    ids = [row for batch in measured["batches"] for row in batch["input_ids"]]
    return {
        **measured,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "Trainer": Trainer,
        "args": TrainingArguments(str(folder / "run"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "donor": model(),
        "dataset": Dataset.from_list([{"text": TEXT[:100]} for _ in range(16)]),
        "inputs": {"input_ids": ids[0][None, :5]},
        "load": model,
        "mixture": build("mixtral", max_position_embeddings=512, **SIZES),
        "model": model(),
        "name": str(models / "stock"),
        "student": model(),
        "teacher": model(),
        "texts": [TEXT] * 4,
        "tokenizer": tokenizer,
    }


def small(code):
    """The steps and tokens of a page that takes minutes, as few."""
    quick = "steps=2, batch_size=2, micro_batch_size=2, sequence_length=16, eval_samples=2"
    for there, here in (
        ('tokens="2M", hidden_weight=0.1', quick),
        ('method="lora")', f'method="lora", {quick})'),
        ('SFTConfig("sft"', 'SFTConfig("sft", use_cpu=True, bf16=False'),
    ):
        code = code.replace(there, here)
    return code


@pytest.mark.parametrize("page, number", CASES)
def test_it_runs(page, number, models, measured, tmp_path, monkeypatch):
    code = snippets(page)[number]
    for part, reason in NOT_RUN.items():
        if part in code:
            pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    given = names(models, measured, tmp_path)
    if "llama_preset" in code:
        with torch.device("meta"):  # the paper's size
            exec(code, given)
    else:
        for name, there in (("google-t5/t5-small", "t5"), ("allenai/OLMoE-1B-7B-0924", "mixture")):
            code = code.replace(name, str(models / there))
        exec(small(code), given)


SCRIPTS = sorted((ROOT / "examples/tutorials").glob("*.py"))


def test_code_of_tutorials_is_that_of_their_scripts():
    """Which are run (test_tutorials.py): each section is on one page, letter by letter."""
    shown = {}
    for page in NAMES:
        for script, section, code in re.findall(r'```python title="(.*?): (\w+)"\n(.*?)```', read(page), re.S):
            assert (script, section) not in shown
            shown[script, section] = code
    written = {
        (str(script.relative_to(ROOT)), section): textwrap.dedent(code)
        for script in SCRIPTS
        for section, code in re.findall(
            r" *# \[start:(\w+)\]\n(.*?) *# \[end:\1\]\n", script.read_text(encoding="utf-8"), re.S
        )
    }
    assert len(written) > 10 and shown == written
