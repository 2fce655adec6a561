"""The house in order: imports go one way, and importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hf_cod"
# The rooms from the ground up: a file imports from its own room and from rooms above it in this list.
ROOMS = [
    "functional",
    "models",
    "io",
    "layers",
    "analysis",
    "scoring",
    "compression",
    "training",
    "reporting",
    "cli",
]
# Beside the rooms: the version, which any file may read.
EVERYWHERE = {"hf_cod._version"}
# Optional packages -> the only folders that may import them.
OPTIONAL = {
    "matplotlib": ["reporting/plots"],
    "datasets": ["io"],
    "evaluate": ["analysis/evaluation"],
    "lm_eval": ["analysis/evaluation", "analysis/generation"],
    "reasoning_gym": ["analysis/generation"],
    "gguf": ["io"],
    "peft": ["io", "training"],
    "bitsandbytes": ["layers", "compression/quantization", "training"],
}
# Pairs that travel to the Hub together: transformers' copier looks for the model beside its configuration, and the
# configuration names the model in its `auto_map`.
CIRCLES_OF_MODELS = {
    frozenset({f"hf_cod.models.configuration_{name}", f"hf_cod.models.modeling_{name}"})
    for name in (
        "shaped",
        *(f"cod_{family}" for family in ("llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3", "vit")),
    )
}
# Files that import a module by its name, to which the order cannot be read off -> which, and why.
BY_NAME = {
    "io/report.py": (
        "reporting.plots and reporting.html, the only calls of a lower room into a higher one: `RunReport.plot` and "
        "`RunReport.to_html` are public. A registry would be filled by the same names, from the front door"
    ),
    "io/exporting.py": "the engines of compression.export: `LayerAllocation.export` and `BitPlan.export` are public",
    "models/configuration_cod.py": "families: the first config of a family registers its models",
    "models/families.py": "the modeling files, which take seconds to import",
    "models/__init__.py": "all of models, when a name is first used",
    "cli/main.py": "the command that was called",
    "cli/recorded.py": (
        "the command that a report is of, for its options; a circle, because each command records itself in its card"
    ),
    "cli/completion.py": "all commands, for their options",
    "io/native_kernel.py": "the kernel that it has built",
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(path: Path):
    """Names of modules, relative imports resolved; of `from package import module` the module."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    place = path.relative_to(ROOT)
    room = place.parts[0]
    assert room in ROOMS, f"{room} has no place in ROOMS"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] in OPTIONAL:
            allowed = OPTIONAL[parts[0]]
            assert any(Path(folder) in place.parents for folder in allowed), f"only {allowed} may import {parts[0]}"
        if parts[0] != "hf_cod" or name in EVERYWHERE:
            continue
        assert len(parts) > 1, "import the module that is meant, not the package"
        assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{room} must not import {parts[1]}"


def test_what_is_imported_by_name_is_listed():
    found = {
        path.relative_to(ROOT).as_posix() for path in FILES if "import_module(" in path.read_text(encoding="utf-8")
    }
    assert found == BY_NAME.keys()


def test_no_circles():
    """Of files, but for those of models that are explained above; and none of folders."""
    arrows = {name: {n for n in imports_of(path) if n in MODULES} - {name} for name, path in MODULES.items()}
    files = {name: to for name, to in arrows.items() if MODULES[name].name != "__init__.py"}
    assert circles_of(files) == CIRCLES_OF_MODELS
    folders: dict[str, set[str]] = {}
    for name, to in arrows.items():
        if "." in name:  # the package's own front door imports all rooms
            folders.setdefault(folder_of(name), set()).update(folder_of(n) for n in to if n not in EVERYWHERE)
    assert circles_of({name: to - {name} for name, to in folders.items()}) == set()


def folder_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def circles_of(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of names that reach each other."""

    def reached(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            for other in arrows.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reach = {name: reached(name) for name in arrows}
    return {
        frozenset(other for other in reach[name] if name in reach.get(other, ()))
        for name in arrows
        if name in reach[name]
    }


def test_models_travel_alone():
    """Their files are copied flat beside the weights, where this package does not exist."""
    for path in (ROOT / "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        relative = [node for node in froms if node.level]
        assert all(node.level == 1 and node.module and "." not in node.module for node in relative), path
        assert not [node for node in froms if not node.level and node.module.split(".")[0] == "hf_cod"], path
        assert not {name.split(".")[0] for name in imports_of(path)} & OPTIONAL.keys(), path


def test_functional_imports_torch_alone():
    for path in (ROOT / "functional").glob("*.py"):
        outside = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
        assert outside <= {"torch", "hf_cod"}, path


@pytest.mark.process
def test_nothing_optional_is_imported_with_the_package():
    unwanted = {*OPTIONAL, "transformers.trainer_callback"}
    code = f"import sys, hf_cod, hf_cod.cli; assert not {unwanted!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_directory_of_leftovers():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "helpers", "misc", "common"}
