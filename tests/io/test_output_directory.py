"""Where a command writes: what is refused before anything is written, who holds it, and how it is finished."""

import json
import os
import shutil
import threading
import time

import pytest

from hf_cod.io import directory_lock, output_checks
from hf_cod.io.files import directory_aside, write_text
from hf_cod.io.output_checks import check_unused
from hf_cod.io.output_directory import OutputDirectory, OutputError
from tests.fresh_processes import run_fresh


def tree(folder):
    """All paths below, with the contents of files and the targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def hostile(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "2024.txt").write_text("precious")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "journal").write_text("a file of this name")
    return tmp_path


@pytest.mark.parametrize(
    "name, message",
    [
        ("file", "expected a directory, got the file"),
        ("file/below", "expected a directory that can be written"),
        ("file/below/deeper", "expected a directory that can be written"),
        ("dangling", "a broken link"),
        ("dangling/below", "expected a directory that can be written"),
        ("loop", "expected"),
        ("a\0b", "expected"),
        ("x" * 300, "File name too long"),
        ("new/" + "x" * 300, "expected a directory that can be written"),
        ("/proc/hf-cod", "expected a directory that can be written"),
        ("/sys/hf-cod/deeper", "expected a directory that can be written"),
        ("model", "expected another directory than the model's"),
        ("notes/../model", "expected another directory than the model's"),
        ("notes", "which holds 2024.txt"),
        ("taken", "which holds journal"),
    ],
)
def test_a_hostile_output_is_refused_and_nothing_is_written(hostile, name, message):
    before = tree(hostile)
    with pytest.raises(ValueError, match=r"^output: expected") as refused:
        OutputDirectory(hostile / name, check=check_unused, source=str(hostile / "model")).__enter__()
    assert message in str(refused.value) and tree(hostile) == before


@pytest.mark.parametrize("name", ["journal", "journal/lock", "journal/result", "journal/manifest.json"])
def test_a_journal_that_is_a_link_is_refused(tmp_path, name):
    link, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    link.parent.mkdir(parents=True)
    elsewhere.write_text("precious") if "." in name or name.endswith("lock") else elsewhere.mkdir()
    link.symlink_to(elsewhere)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"output: expected a journal of hf_cod, got '.*{name}', a link; remove it"):
        OutputDirectory(tmp_path / "run", run=1).__enter__()
    assert tree(tmp_path) == before


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(output_checks.os, "fsync", fails)
    with pytest.raises(ValueError, match=r"output: expected a directory that can be written.*Read-only file system"):
        OutputDirectory(tmp_path / "a" / "b").__enter__()
    assert tree(tmp_path) == {}


def test_a_disk_without_room_is_refused_and_nothing_stays(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with OutputDirectory(tmp_path / "enough") as output:
        output.require(free // 2)
    with (
        pytest.raises(ValueError, match=r"output: expected at least .* MB free"),
        OutputDirectory(tmp_path / "a" / "b") as output,
    ):
        output.require(free * 2)
    assert "a" not in tree(tmp_path)


def test_one_works_and_the_other_is_refused_at_once(tmp_path):
    refused = []

    def other():
        try:
            with OutputDirectory(tmp_path / "out"):
                refused.append(None)
        except ValueError as error:
            refused.append(str(error))

    with OutputDirectory(tmp_path / "out"), OutputDirectory(tmp_path / "out"):  # the same thread may enter again
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with OutputDirectory(tmp_path / "another"):
            pass
    assert "a directory that no other command writes to" in refused[0] and "one is running" in refused[0]
    other()
    assert refused[1] is None, "the lock ends with its holder"


@pytest.mark.process
def test_another_process_is_refused(tmp_path):
    code = (
        "import sys\n"
        "from hf_cod.io.output_directory import OutputDirectory\n"
        "try:\n"
        "    OutputDirectory(sys.argv[1]).__enter__()\n"
        "except ValueError as error:\n"
        "    sys.exit(str(error))\n"
    )
    with OutputDirectory(tmp_path / "out"):
        done = run_fresh(code, tmp_path / "out")
        assert done.returncode == 1 and "where one is running" in done.stderr
    assert run_fresh(code, tmp_path / "out").returncode == 0, "a process that died holds nothing"
    with OutputDirectory(tmp_path / "out"):
        pass


def fill(output):
    for name in ("model.safetensors", "config.json", "report.json", "adapter/config.json"):
        write_text(output.results / name, name)


IN_THE_MOVES = 9  # after a probe, four files, a look at the umask, the manifest, and the move of a first file


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(monkeypatch, step, work):
    """Does work; at the step-th change of the disk in finishing, all that an interpreter would tidy is left undone."""
    count = [0]

    def dying(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == step:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "_clear", lambda self: None)
        for place, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (os, "rmdir")):
            patch.setattr(place, name, dying(getattr(place, name)))
        try:
            work()
        except Killed:
            directory_lock._held.clear()  # as it ends with a process
            return True
    return False


def test_a_run_that_is_killed_while_it_finishes_is_completed_by_the_next(tmp_path, monkeypatch):
    made = {"model.safetensors", "config.json", "report.json", "adapter/config.json"}
    steps, completed = 1, []
    while True:
        out = tmp_path / str(steps)
        (out / "checkpoint-3").mkdir(parents=True)

        def work(out=out):
            with OutputDirectory(out, ["same"]) as output:
                fill(output)
                output.finish(["checkpoint-3"])

        if not killed_at(monkeypatch, steps, work):
            break
        if (out / "config.json").exists():
            assert {name for name in made if (out / name).is_file()} == made, "a model is there when the rest is"
        with OutputDirectory(out, ["same"]) as output:
            completed.append(output.completed)
            if not output.completed and not (out / "config.json").exists():
                fill(output)
                output.finish(["checkpoint-3"])
        files = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
        assert files == {name: name for name in made} and not (out / "checkpoint-3").exists(), steps
        assert not (out / "journal").exists()
        steps += 1
    assert steps > 6 and completed.count(True) > 4


# Runs of the same work, each in a process that dies at another change of the disk: from the first to the last one.
DYING = """
import os, shutil, sys
from hf_cod.io.files import write_text
from hf_cod.io.output_checks import check_unused
from hf_cod.io.output_directory import OutputDirectory

def dies_at(step):
    count = [0]
    def dying(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == step: os._exit(9)
            return function(*args, **kwargs)
        return wrapped
    for place, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (os, "rmdir")):
        setattr(place, name, dying(getattr(place, name)))

for step in range(1, 100):
    child = os.fork()
    if not child:
        dies_at(step)
        with OutputDirectory(f"{sys.argv[1]}/{step}", ["same"], check=check_unused) as output:
            for name in ("model.safetensors", "config.json", "report.json", "adapter/config.json"):
                write_text(output.results / name, name)
            write_text(output.journal / "work.jsonl", "")
            output.finish(output.journaled())
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0: break
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("run", [["same"], ["other"]])
def test_the_next_command_removes_what_a_killed_one_left(run, tmp_path):
    assert run_fresh(DYING, tmp_path).returncode == 0
    states, said = sorted(tmp_path.iterdir(), key=lambda path: int(path.name)), []
    for out in states:
        try:
            with OutputDirectory(out, run, check=check_unused) as output:
                said.append("completed" if output.completed else "done again")
                if not output.completed:
                    fill(output)
                    output.finish(output.journaled())
        except ValueError as error:
            said.append("finished" if "which holds a finished run" in str(error) else "another's")
            assert said[-1] == "finished" or "another run was killed while it finished" in str(error)
        if said[-1] == "another's":
            assert (out / "journal" / "manifest.json").is_file()
        else:
            assert tree(out).keys() == {
                "adapter",
                "adapter/config.json",
                "config.json",
                "model.safetensors",
                "report.json",
            }
    assert said.count("completed" if run == ["same"] else "another's") > 5
    assert said[-3:] == ["finished"] * 3, "killed before the lock was removed, before the journal was, and not at all"


def test_a_refused_command_leaves_a_strangers_journal(tmp_path):
    for name in ("journal/notes.txt", "report.json"):
        write_text(tmp_path / "notes" / name, "precious")
    (tmp_path / "empty" / "journal").mkdir(parents=True)
    write_text(tmp_path / "empty" / "precious.txt", "precious")
    before = tree(tmp_path)
    for name in ("notes", "empty"):
        with pytest.raises(ValueError, match="output: expected a new directory"):
            OutputDirectory(tmp_path / name, check=check_unused).__enter__()
    assert tree(tmp_path) == before


def test_a_refused_command_leaves_the_lock_of_a_running_one(tmp_path):
    write_text(tmp_path / "report.json", "{}")
    refused = []

    def other():
        try:
            OutputDirectory(tmp_path, check=check_unused).__enter__()
        except ValueError as error:
            refused.append(str(error))

    with OutputDirectory(tmp_path) as output:
        for start in (other, lambda: (thread := threading.Thread(target=other), thread.start(), thread.join())):
            start()
            assert "which holds a finished run" in refused.pop()
            assert (output.journal / "lock").is_file()
        fill(output)
        output.finish()


def test_another_run_does_not_complete_it(tmp_path, monkeypatch):
    def work():
        with OutputDirectory(tmp_path / "out", ["one"]) as output:
            fill(output)
            output.finish()

    assert killed_at(monkeypatch, IN_THE_MOVES, work)
    assert (tmp_path / "out" / "journal" / "manifest.json").is_file()
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="where another run was killed while it finished"):
        OutputDirectory(tmp_path / "out", ["two"]).__enter__()
    assert tree(tmp_path / "out") == before
    with OutputDirectory(tmp_path / "out") as output:  # a command that adds to what is there
        assert not output.completed and (tmp_path / "out" / "config.json").is_file()


def test_results_that_are_lost_before_they_are_completed_are_made_again(tmp_path, monkeypatch):
    def work():
        with OutputDirectory(tmp_path / "out", ["one"], check=check_unused) as output:
            fill(output)
            output.finish()

    assert killed_at(monkeypatch, IN_THE_MOVES, work)
    assert (tmp_path / "out" / "journal" / "manifest.json").is_file()
    shutil.rmtree(tmp_path / "out" / "journal" / "result")
    with OutputDirectory(tmp_path / "out", ["one"], check=check_unused) as output:
        assert not output.completed
        assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == set()
        fill(output)
        output.finish()
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("change", [{"config.json": 7}, {"another.json": 7}])
def test_results_are_made_again_where_one_is_lost_and_the_others_are_not_moved(tmp_path, monkeypatch, change):
    def work():
        with OutputDirectory(tmp_path / "out", ["one"], check=check_unused) as output:
            fill(output)
            output.finish()

    assert killed_at(monkeypatch, IN_THE_MOVES, work)
    path = tmp_path / "out" / "journal" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "files": {**content["files"], **change}}))
    with OutputDirectory(tmp_path / "out", ["one"], check=check_unused) as output:
        assert not output.completed
        assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == set()


@pytest.mark.parametrize(
    "content",
    [
        {"format": 1, "run": None, "files": {"../stolen": 1}, "spent": []},
        {"format": 1, "run": None, "files": {"/stolen": 1}, "spent": []},
        {"format": 1, "run": None, "files": {}, "spent": ["../precious"]},
        {"format": 1, "run": None, "files": {}, "spent": ["journal/../../precious"]},
        {"format": 2, "run": None, "files": {}, "spent": []},
        {"format": 1, "run": None, "files": {"a": "1"}, "spent": []},
        {"format": 1, "run": None, "files": {"a": -1}, "spent": []},
        {"format": 1, "run": None, "files": {}, "spent": []},
        {"format": 1, "run": None, "files": {"config.json": 2}, "spent": []},
        ["manifest"],
    ],
)
def test_a_manifest_of_a_stranger_is_refused(tmp_path, content):
    out = tmp_path / "out"
    (out / "journal" / "result").mkdir(parents=True)
    (out / "journal" / "result" / "config.json").write_text("{}")
    (out / "journal" / "result" / "model.safetensors").write_text("a result that the manifest must list")
    (out / "journal" / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "precious").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="output: expected a manifest of hf_cod"):
        OutputDirectory(out).__enter__()
    assert tree(tmp_path) == before


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    left = [".report.md.ab12cd34", ".overview.png.x_1y2z3a", "journal/.0123456789abcdef-00003.safetensors.abcd_123"]
    others = [".report.md.swp", ".bashrc", "report.md.ab12cd34", "journal/notes.txt"]
    for name in (*left, *others):
        write_text(out / name, "x")
    for name, age in ((".out-abcd1234", 7200), (".out-abcd1235", 0), (".other-abcd1234", 7200)):
        write_text(tmp_path / name / "config.json", "{}")
        for path in (tmp_path / name / "config.json", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    with OutputDirectory(out):
        pass
    assert not any((out / name).exists() for name in left) and all((out / name).exists() for name in others)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other-abcd1234", ".out-abcd1235", "out"]


def test_a_directory_that_is_deleted_is_noticed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="the directory deleted; results are lost"), OutputDirectory(out) as o:
        fill(o)
        shutil.rmtree(out)
        fill(o)  # which makes it again
        o.finish()
    with pytest.raises(OutputError, match=r"got scores.json deleted"), OutputDirectory(out) as o:
        fill(o)
        o.finish(beside=["scores.json"])


def test_the_umask_decides_who_reads(tmp_path):
    for mask in (0o077, 0o022, 0o002):
        before = os.umask(mask)
        try:
            write_text(tmp_path / f"{mask}.txt", "x")
            with directory_aside(tmp_path / f"{mask}") as aside:
                write_text(aside / "in.txt", "x")
        finally:
            os.umask(before)
        modes = [path.stat().st_mode & 0o777 for path in (tmp_path / f"{mask}.txt", tmp_path / f"{mask}")]
        assert modes == [0o666 & ~mask, 0o777 & ~mask]
