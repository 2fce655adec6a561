"""Every command twice, in processes that hash and draw differently: the same bytes in every file but times.

Their reports have the keys that docs/reference/files.md lists, with one meaning each.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.all_commands import RUNS
from tests.docs.pages import read

# Keys of a report's results, and words in its sentences, of what differs from run to run.
TIMES = {"created", "seconds_a_step", "training_memory", "memory_limit"}
# What the page calls "Compression", and keys that map states of the model to numbers.
COMPRESSION = {"prune", "factorize", "narrow", "drop-layers", "repeat-layers", "drop-experts", "quantize", "fit"}
COMMANDS = {"training": "history"}  # kind of a report -> the command that writes it, if it is another name
BY_STATE = {"parameters", "memory_bytes", "layer_bytes", "layer_weights"}
OF_TIMES = re.compile(r"created|seconds|GB of memory|Memory was not measured|training memory|tokens/s")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value if not (isinstance(item, str) and OF_TIMES.search(item))]
    return timeless(value) if isinstance(value, str) else value


def timeless(text):
    """A sentence on a training without its seconds, which a run lacks that resumed with no step left."""
    return re.sub(r", [\d.e-]+ s per step", "", text)


def contents(file):
    """What must be the same of a file."""
    if file.name == "report.json":
        return json.dumps(without_times(json.loads(file.read_text(encoding="utf-8"))))  # in the order of the file
    if file.name in ("report.md", "README.md"):
        lines = file.read_text(encoding="utf-8").splitlines()
        return [timeless(line) for line in lines if not OF_TIMES.search(line)]
    if file.suffix == ".html":  # a page has the content of its report.json
        return re.sub(r'"created": "[^"]+"', "", file.read_text(encoding="utf-8"))
    return file.read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of both runs, each under its own parent, so that no path tells them apart."""
    root, processes = Path(__file__).parent.parent, {}
    for seed in ("1", "2"):
        folder = tmp_path_factory.mktemp("commands") / "here"
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "tests.all_commands", seed]
        log = (folder.parent / "log").open("w")
        processes[folder] = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    for folder, process in processes.items():
        assert process.wait(3000) == 0, (folder.parent / "log").read_text()[-3000:]
    return list(processes)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", RUNS)
def test_a_command_writes_the_same_bytes_twice(name, runs):
    first, second = (
        sorted(path.relative_to(run) for path in (run / name).rglob("*") if path.is_file()) for run in runs
    )
    assert first == second and first
    wrong = [str(file) for file in first if contents(runs[0] / file) != contents(runs[1] / file)]
    assert not wrong


def documented(part):
    """Key of results, or of layers -> commands, by the table of the page."""
    table = read("docs/reference/files.md").partition(f"| key of `{part}`")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| .+ \| ([^|]+) \|$", table, re.M)
    found = {}
    for keys, commands in rows:
        for key in re.findall(r"`(\w+)`", keys):
            assert key not in found, f"{key} is listed twice"
            found[key] = set(commands.split(", "))
            if "compression" in found[key]:
                found[key] |= COMPRESSION
    return found


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", RUNS)
def test_keys_of_reports_are_documented(name, runs):
    known = {part: documented(part) for part in ("results", "layers")}
    for file in (runs[0] / name).rglob("report.json"):
        report = json.loads(file.read_text(encoding="utf-8"))
        command = COMMANDS.get(report["kind"], report["kind"])
        for part, keys in known.items():
            lacking = [key for key in report[part] if command not in keys.get(key, ())]
            assert not lacking, f"{lacking} in {part} of {command} are not in docs/reference/files.md"
        for key, value in report["results"].items():
            if key in BY_STATE:
                assert value and all(isinstance(number, int) for number in value.values()), (key, value)
            if key == "training_memory":
                assert value.keys() == {"used_bytes", "estimate_bytes", "estimate_parts"}
