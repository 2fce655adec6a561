"""What is written about the project is true of it: versions, recipes, the picture of the house, declared versions."""

import ast
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import hf_cod
from tests.test_imports import ROOMS

ROOT = Path(__file__).parent.parent
# Files that read or parse files by themselves -> why. All others call `io/reading.py`, `io/loading.py`, `io/models.py`
# and `io/model_config.py`, which check what they read.
OWN_READERS = {
    "io/reading.py": "the reader",
    "io/loading.py": "loads models and checks their weights",
    "io/adapters.py": "loads adapters",
    "io/requirements.py": "pyproject.toml of this package",
    "io/models.py": "loads configs and tokenizers, and finds the tokenizer of a GGUF file",
    "io/files.py": "copies and fsyncs files",
    "compression/export/deci.py": "the tokenizer of a GGUF file",
    "io/tensors.py": "verifies the checksum of a file",
    "io/text.py": "texts of the user, of any size",
    "io/rows.py": "files of the user, searched for NUL bytes in parts",
    "training/runs/checkpoint_checksums.py": "checksums of files of any size",
    "layers/replicas.py": "messages of the other processes",
    "layers/memory_limit.py": "the peak that the kernel counts",
    "models/checkpoint.py": "models/ imports no other folder",
    "models/convert.py": "models/ imports no other folder",
    "models/stored_config.py": "models/ imports no other folder",
}
PARSERS = "json|yaml|torch|numpy|np|pickle|tomllib"
# Functions that read; those of `io/reading.py` are called without a module.
READS = re.compile(
    rf"({PARSERS})\.\w*loads?|(.*\.)?(safe_open|load_file|from_pretrained|GGUFReader|ZipFile)|.*\.read_(text|bytes)"
    r"|(?!os\.)(.*\.)?open",
    re.S,
)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "hf_cod").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
# Lines of a function without its head and docstring; examples are read from top to bottom, and may be longer.
LONGEST_BODY, LONGEST_BODY_OF_EXAMPLES = 40, 55
LONGEST_FILE, LONGEST_MODELING_FILE = 300, 450
# Files and functions beyond these limits, to be shortened, with their lines now: no line more.
LONG_FILES: dict[str, int] = {}
LONG_BODIES: dict[tuple[str, str], int] = {}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_all_tests_that_are_left_out_by_default_run_in_ci():
    """By a `-m` of .ci/run or of a job, that is not its negation; and a job has a limit of time."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    (left_out,) = re.findall(r"-m 'not \((.*?)\)'", options["addopts"])
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(workflow)["jobs"].values()
    calls = [*(ROOT / ".ci/run").read_text(encoding="utf-8").splitlines(), *workflow.splitlines()]
    chosen = " ".join(re.sub(r"not \w+", "", line.partition("-m pytest")[2]) for line in calls)
    assert set(left_out.split(" or ")) <= set(re.findall(r"\w+", chosen))
    assert all(job["timeout-minutes"] for job in jobs)


def test_lines_of_the_changelog_are_short():
    assert not [number for number, line in enumerate(CHANGELOG.splitlines(), 1) if len(line) > 120]


def test_no_merge_left_its_marks():
    texts = [path for suffix in ("md", "py", "toml", "yml") for path in ROOT.rglob(f"*.{suffix}")]
    ours = [path for path in texts if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    marked = re.compile(r"^(<{7}|>{7}|\|{7}) ", re.M)
    assert not [path for path in ours if marked.search(path.read_text(encoding="utf-8"))]


def test_one_version():
    released = re.findall(r"^## \[(\d[\d.]*)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.M)
    assert released[0][0] == hf_cod.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == released[0]


def picture() -> dict[str, str]:
    """Entry of `hf_cod/` in CONTRIBUTING -> what the picture says of it."""
    block = CONTRIBUTING.split("    hf_cod/\n")[1].split("\n\n")[0]
    lines = [line.removeprefix("    ") for line in block.splitlines()]
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("   "):
            name, _, rest = line.strip().partition(" ")
            found[name] = rest
        else:
            found[name] += f" {line.strip()}"
    return found


def test_the_picture_is_the_house():
    found = picture()
    assert [name.rstrip("/") for name in found if name not in ("__init__.py", "_registration.py", "assets/")] == ROOMS
    for place, told in found.items():
        assert (ROOT / "hf_cod" / place).exists(), place
        for name in re.findall(r"\b(\w+\.py|\w+/)(?=\W|$)", told):
            assert (ROOT / "hf_cod" / place / name).exists(), f"{place}{name}"


def test_every_folder_is_in_the_picture():
    """The rooms, and the folders in each of them: a new one needs its words there."""
    found = picture()
    rooms = {path.name for path in (ROOT / "hf_cod").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(ROOMS)
    for room in rooms:
        folders = {path.parent.name for path in (ROOT / "hf_cod" / room).glob("*/*.py")}
        named = {name for name in re.findall(r"\b(\w+)/", found[f"{room}/"])}
        assert folders == named, f"{room}: {folders ^ named}"


def test_every_file_of_a_room_is_in_the_picture():
    """By its name or, like the modeling files, by a pattern."""
    found = picture()
    for room in ROOMS:
        named = re.findall(r"[\w*]+\.py\b", found[f"{room}/"])
        for path in (ROOT / "hf_cod" / room).glob("*.py"):
            assert path.name == "__init__.py" or any(fnmatch(path.name, name) for name in named), f"{room}/{path.name}"


@pytest.mark.parametrize("path", FILES + EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    """Of the package and of the examples; tests may be longer."""
    place, code = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    most = LONGEST_MODELING_FILE if path.name.startswith("modeling_") else LONGEST_FILE
    assert len(code.splitlines()) <= LONG_FILES.get(place, most)
    longest = LONGEST_BODY_OF_EXAMPLES if path in EXAMPLES else LONGEST_BODY
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body if ast.get_docstring(node) is None else node.body[1:]
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= LONG_BODIES.get((place, node.name), longest), f"{node.name}: {lines} lines"


def test_recipes_name_files_and_tables_that_there_are():
    recipes = CONTRIBUTING.split("## Recipes")[1]
    paths = set(re.findall(r"`((?:hf_cod|tests|examples)/[\w/.]+)`", recipes))
    assert len(paths) > 15
    for path in paths:
        assert "NAME" in path or (ROOT / path).exists(), path
    for path, told in re.findall(r"^\d\. `(hf_cod/[\w/]+\.py)`(.*?)(?=^\d\. |^#|\Z)", recipes, re.M | re.S):
        if "NAME" not in path:
            code = (ROOT / path).read_text(encoding="utf-8")
            for table in re.findall(r"`([A-Z][A-Z_]+)`", told):
                assert re.search(rf"^{table}\b.*= ", code, re.M), f"{path}: {table}"


def test_every_dependency_has_a_lower_bound():
    """`.ci/lowest` installs those versions, so each must be there to read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    for requirement in declared:
        assert re.match(r"hf_cod\[|[\w.-]+>=\d", requirement), requirement


def reads(node: ast.AST) -> bool:
    """Whether this is a call that reads or parses a file, or an import that gives such a function another name."""
    if isinstance(node, ast.Import):
        return any(one.asname not in (None, "np") and re.fullmatch(PARSERS, one.name) for one in node.names)
    if isinstance(node, ast.ImportFrom):
        return bool(re.fullmatch(PARSERS, node.module or "")) and any("load" in one.name for one in node.names)
    if not isinstance(node, ast.Call) or not READS.fullmatch(ast.unparse(node.func)):
        return False
    given = [*node.args, *(option.value for option in node.keywords if option.arg == "mode")]
    return not any(isinstance(one, ast.Constant) and re.fullmatch("[wax][bt+]*", str(one.value)) for one in given)


def test_files_are_read_by_the_reader():
    found = set()
    for path in FILES:
        if any(reads(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
            found.add(path.relative_to(ROOT / "hf_cod").as_posix())
    assert found == set(OWN_READERS)


@pytest.mark.parametrize(
    "code, expected",
    [
        ("json.load(file)", True),
        ("torch.load(path)", True),
        ("yaml.safe_load(text)", True),
        ("AutoTokenizer.from_pretrained(name)", True),
        ("load_file(path)", True),
        ("path.read_text()", True),
        ("Path(path).read_bytes()", True),
        ("open(path)", True),
        ("open(path, encoding='utf-8')", True),
        ("path.open('rb')", True),
        ("open(path, mode='r')", True),
        ("from json import loads", True),
        ("import pickle as p", True),
        ("import numpy as np", False),
        ("read_text(path, 'field')", False),
        ("read_bytes(path, 'field')", False),
        ("LayerStatistics.load(path)", False),
        ("path.open('a')", False),
        ("os.open(path, os.O_RDONLY)", False),
    ],
)
def test_calls_that_read(code, expected):
    assert any(reads(node) for node in ast.walk(ast.parse(code))) is expected
