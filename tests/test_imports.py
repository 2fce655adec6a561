"""The house in order: imports go one way, and importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hf_cod"
# Each room imports only rooms of lower lines; files of one line do not import each other unless named as a folder.
ORDER = [
    ["functional", "files", "models", "stock_four_bit"],
    ["decoder_layers", "calibration", "positions", "stored_modules", "native_kernel"],
    ["devices"],
    [
        "layer_removal",
        "evaluation",
        "report",
        "loading",
        "sparse",
        "writable_weights",
        "same_model",
        "model_size",
        "pruned_weights",
    ],
    ["layer_units"],
    ["diagnostics"],
    ["statistics", "training", "layer_by_layer", "model_speed"],
    ["scores"],
    ["allocation", "comparison", "pretraining"],
    ["finetuning", "pruning", "low_rank", "quantization", "depth", "width"],
    ["healing", "fit"],
    ["plots", "model_card"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# Optional packages -> the only rooms that may import them.
OPTIONAL = {
    "matplotlib": ["plots"],
    "datasets": ["calibration"],
    "evaluate": ["evaluation"],
    "lm_eval": ["evaluation"],
    "gguf": ["loading"],
    "peft": ["pruning", "finetuning"],
    "bitsandbytes": ["quantization", "finetuning", "stock_four_bit"],
}
# A report can be asked for its picture: the one arrow that goes up, and only inside a method.
UPWARDS = {("report", "plots"), ("comparison", "plots")}
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path):
    """(imported name, whether at the top of the file)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no place in ORDER"
    for name, at_top in imports_of(path):
        parts = name.split(".")
        if parts[0] in OPTIONAL:
            assert room in OPTIONAL[parts[0]], f"only {OPTIONAL[parts[0]]} may import {parts[0]}"
        if parts[0] != "hf_cod" or len(parts) == 1 or parts[1] not in RANK:
            continue
        if (room, parts[1]) in UPWARDS:
            assert not at_top
        else:
            assert room == parts[1] or RANK[parts[1]] < RANK[room], f"{room} must not import {parts[1]}"


def test_models_travel_alone():
    """Their files are copied flat beside the weights, where this package does not exist."""
    for path in (ROOT / "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 and node.module and "." not in node.module for node in relative), path
        outside = {name.split(".")[0] for name, _ in imports_of(path)}
        assert not outside & {"hf_cod", *OPTIONAL}, path


def test_functional_imports_torch_alone():
    for path in (ROOT / "functional").glob("*.py"):
        outside = {name.split(".")[0] for name, _ in imports_of(path)} - sys.stdlib_module_names
        assert outside <= {"torch", "hf_cod"}, path


def test_nothing_optional_is_imported_with_the_package():
    unwanted = {*OPTIONAL, "transformers.trainer_callback"}
    code = f"import sys, hf_cod, hf_cod.cli; assert not {unwanted!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_directory_of_leftovers():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "helpers", "misc", "common"}
