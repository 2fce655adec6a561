"""Commands whose output fails them: a disk that fills, a directory that goes, a kill while results are moved."""

import errno
import os
import random
import resource
import shutil

import pytest
from transformers import AutoModelForCausalLM

from hf_cod import RunReport, prune
from hf_cod.cli.commands import env
from hf_cod.cli.main import main
from hf_cod.io import directory_lock
from hf_cod.io.output_directory import OutputDirectory
from tests.fresh_processes import run_fresh
from tests.small_disks import can_mount, resize, small_disk
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 60
QUICK = "--sequence-length 8 --max-samples 4 --batch-size 2 --no-plots --device cpu"
TRAINING = "--steps 2 --batch-size 2 --micro-batch-size 2 --sequence-length 8 --eval-samples 2 --save-every 1"
TRAINING += " --log-every 1 --method full --no-plots --device cpu"
COMMANDS = {
    "prune": f"prune MODEL --text TEXT --score uniform --no-baseline {QUICK}",
    "narrow": f"narrow MODEL --text TEXT --score uniform --channel-multiple 8 --no-baseline {QUICK}",
    "drop-experts": f"drop-experts MIXTURE --text TEXT --share 0.5 --no-speed {QUICK}",
    "finetune": f"finetune MODEL --text TEXT {TRAINING}",
    "pack": "pack SPARSE --device cpu",
    "convert": "convert lns MODEL OUTPUT",
    "score": f"score MODEL --text TEXT {QUICK}",
    "diagnose": f"diagnose MODEL --text TEXT {QUICK}",
}
WITH_MODEL = ("prune", "narrow", "drop-experts", "finetune", "pack", "convert")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    model = build("llama")
    model.save_pretrained(folder / "model")
    prune(model, 0.7, "magnitude")
    model.save_pretrained(folder / "sparse")
    build("mixtral").save_pretrained(folder / "mixture")
    for name in ("model", "sparse", "mixture"):
        gpt_like().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def command(sources):
    def made(name, output):
        names = {"MODEL": "model", "SPARSE": "sparse", "MIXTURE": "mixture", "TEXT": "text.txt"}
        places = {word: sources / file for word, file in names.items()}
        words = [str({**places, "OUTPUT": output}.get(word, word)) for word in COMMANDS[name].split()]
        return words if "OUTPUT" in COMMANDS[name] else [*words, "--output", str(output)]

    return made


def check_failed(name, status, out, capsys):
    """One line that names the directory, nothing half, and what a resumed run needs is whole."""
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if line.startswith("hf-cod")]
    assert status in (1, 2) and len(said) == 1 and said[0].startswith(f"hf-cod {name}: error: "), (status, said)
    assert str(out) in said[0], said
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()}
    assert not any(path.name.startswith(".") for path in out.rglob("*")), names
    if not (out / "journal" / "manifest.json").exists():
        assert not (out / "journal" / "result").exists() and not (out / "journal" / "lock").exists()
        assert name not in WITH_MODEL or not {"config.json", "model.safetensors"} & names, names
    for path in out.glob("checkpoint-*"):
        assert (path / "trainer_state.json").is_file()


def check_done(name, out):
    assert not (out / "journal").exists() and not list(out.glob("checkpoint-*"))
    if name in WITH_MODEL:
        AutoModelForCausalLM.from_pretrained(out)
    if name != "convert":
        RunReport.load(out)


def when(monkeypatch, number, then):
    """Does something at a number of the times that a file is brought to the disk; returns how often that was."""
    fsync, count = os.fsync, [0]

    def patched(handle):
        count[0] += 1
        if count[0] == number:
            then()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", patched)
    return count


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def syncs():
    """Command -> how many files it brings to the disk, once that is known."""
    return {}


def moments(name, syncs, command, tmp_path, monkeypatch, few):
    """Random moments of a command's writing, the first and the last among them."""
    if name not in syncs:
        with monkeypatch.context() as patch:
            count = when(patch, 0, full)
            assert main(command(name, tmp_path / "counted")) == 0
        check_done(name, tmp_path / "counted")
        syncs[name] = count[0]
    between = range(2, syncs[name])
    return [1, *random.Random(0).sample(between, min(few, len(between))), syncs[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_is_one_line_and_the_same_command_resumes(
    name, syncs, command, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    for moment in moments(name, syncs, command, tmp_path, monkeypatch, 4):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            when(patch, moment, full)
            status = main(command(name, out))
        if status == 0:
            break  # a resumed run writes less
        check_failed(name, status, out, capsys)
    if status:
        assert main(command(name, out)) == 0
    check_done(name, out)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_deleted_meanwhile_is_no_success(name, syncs, command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for moment in moments(name, syncs, command, tmp_path, monkeypatch, 2)[1:-1]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            when(patch, moment, lambda: shutil.rmtree(out))
            status = main(command(name, out))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-cod")]
        assert status == 1 and len(said) == 1 and "deleted; results are lost" in said[0], (moment, said)
    assert main(command(name, out)) == 0
    check_done(name, out)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_an_output_that_is_deleted_while_results_are_moved(name, command, tmp_path, monkeypatch, capsys):
    out, replace = tmp_path / "out", os.replace

    def deletes(source, target):
        replace(source, target)
        if target == out / "model.safetensors":
            shutil.rmtree(out / "journal")  # a deletion does not see what is moved meanwhile

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deletes)
        assert main(command(name, out)) == 1
    assert "results are lost" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()
    assert main(command(name, out)) == 0
    check_done(name, out)


@pytest.mark.parametrize("name", ["prune", "finetune", "pack"])
def test_weights_that_cannot_be_written_by_other_libraries(name, command, tmp_path, capsys):
    """A limit of the size of files, which safetensors and torch meet beyond Python."""
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status = main(command(name, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_failed(name, status, out, capsys)
    assert main(command(name, out)) == 0
    check_done(name, out)


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("name", ["prune", "finetune", "score", "diagnose", "pack"])
def test_a_small_disk(name, command, tmp_path, capsys):
    disk, sizes = tmp_path / "disk", random.Random(1)
    out = disk / "out"
    with small_disk(disk, 4 << 20):
        for _ in range(4):
            resize(disk, shutil.disk_usage(disk).used + sizes.choice([1, 5, 9, 40, 90, 200, 400]) * 4096)
            capsys.readouterr()
            status = main(command(name, out))
            if status == 0:
                break
            check_failed(name, status, out, capsys)
        resize(disk, 4 << 20)
        assert status == 0 or main(command(name, out)) == 0
        check_done(name, out)


@pytest.mark.parametrize("name", ["prune", "finetune", "pack"])
def test_killed_while_it_finishes_the_same_command_completes_it(name, command, tmp_path, monkeypatch, capsys):
    """What the disk holds at each move of a file, and what the same command makes of it."""
    out, states, replace = tmp_path / "out", [], os.replace

    def kept(source, target):
        if os.sep + "result" + os.sep in str(source) and os.sep + "result" + os.sep not in str(target):
            states.append(shutil.copytree(out, tmp_path / f"state{len(states)}"))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kept)
        assert main(command(name, out)) == 0
    made = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(states) >= 4
    for state in states:
        capsys.readouterr()
        assert main(command(name, state)) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "written to" in shown
        found = {str(path.relative_to(state)): path.read_bytes() for path in state.rglob("*") if path.is_file()}
        assert found == made
    assert main(command("narrow", out)) == 2, "that of another run"


@pytest.mark.process
def test_a_process_that_dies_while_it_finishes(command, tmp_path):
    code = (
        "import os, sys\n"
        "replace = os.replace\n"
        "def dies(source, target):\n"
        "    replace(source, target)\n"
        "    if str(target).endswith('model.safetensors'): os._exit(9)\n"
        "os.replace = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert run_fresh(code, *command("prune", tmp_path / "out")).returncode == 9
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"journal", "model.safetensors"} <= names and "config.json" not in names
    assert main(command("prune", tmp_path / "out")) == 0
    check_done("prune", tmp_path / "out")


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_the_umask_decides_who_reads_results(mask, command, tmp_path):
    before = os.umask(mask)
    try:
        for name in ("prune", "finetune", "score"):
            assert main(command(name, tmp_path / name)) == 0
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): (path.stat().st_mode & 0o777, (0o777 if path.is_dir() else 0o666) & ~mask)
        for name in ("prune", "finetune", "score")
        for path in [tmp_path / name, *(tmp_path / name).rglob("*")]
    }
    assert {name: mode for name, (mode, expected) in modes.items() if mode != expected} == {}


def test_a_second_command_in_the_same_directory_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    with OutputDirectory(out):
        held = dict(directory_lock._held)
        directory_lock._held.clear()  # as in another process
        for name in COMMANDS:
            assert main(command(name, out)) == 2
            assert "no other command writes to" in capsys.readouterr().err
        directory_lock._held.update(held)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "error, status, told",
    [
        (OSError(5, "Input/output error", "/x"), 1, "[Errno 5] Input/output error: '/x'"),
        (RuntimeError("CUDA out of memory\nmore"), 1, "CUDA out of memory"),
        (MemoryError(), 1, "MemoryError"),
        (ValueError("field: expected a, got b"), 2, "field: expected a, got b"),
    ],
)
def test_what_fails_in_the_work_is_one_line(error, status, told, monkeypatch, capsys):
    def fails(arguments):
        raise error

    monkeypatch.setattr(env, "main", fails)
    assert main(["env"]) == status
    assert capsys.readouterr().err == f"hf-cod env: error: {told}\n"
    assert main(["env", "--debug"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"hf-cod env: error: {told}\n")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(env, "main", lambda arguments: {}["missing"])
    with pytest.raises(KeyError):
        main(["env"])
