"""A run's directory: resumed by the same run, refused to others, and never one that holds something else."""

import json
import re

import pytest

from hf_cod.training.runs.checkpoint_checksums import mark, write_checksums
from hf_cod.training.runs.checkpoint_files import check_files
from hf_cod.training.runs.run_directory import begun_steps, claim, last_checkpoint, last_steps
from tests.training.runs.checkpoints import MARKER, whole_checkpoint

WANTED = {"model": "m", "rate": 0.5}


def checkpoint(folder, step, marker="{}"):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if marker is not None:
        (path / MARKER).write_text(marker)
    return path


def test_the_newest_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path, MARKER, check_files) is None
    whole = [whole_checkpoint(tmp_path, step) for step in (9, 10)]
    checkpoint(tmp_path, 11, marker='{"half')
    checkpoint(tmp_path, 12, marker=None)
    (tmp_path / "checkpoint-13").write_text("a file")
    checkpoint(tmp_path, "14-best")
    assert [step for step, _ in last_steps(tmp_path)] == [12, 11, 10, 9]
    assert last_checkpoint(tmp_path, MARKER, check_files) == whole[1]


def test_the_same_run_resumes_and_another_one_is_refused(tmp_path):
    claim(tmp_path / "run", WANTED)
    noted = (tmp_path / "run" / "settings.json").read_text()
    checkpoint(tmp_path / "run", 3)
    claim(tmp_path / "run", dict(reversed(WANTED.items())))
    with pytest.raises(ValueError, match=r"rate: expected 0\.5, as in the run in .*, got 0\.7"):
        claim(tmp_path / "run", {**WANTED, "rate": 0.7})
    assert (tmp_path / "run" / "settings.json").read_text() == noted and json.loads(noted) == WANTED
    (tmp_path / "run" / "settings.json").write_text(json.dumps({**WANTED, "rate": True}))
    with pytest.raises(ValueError, match=r"rate: expected True, as in the run in .*, got 1\.0"):
        claim(tmp_path / "run", {**WANTED, "rate": 1.0})


def test_before_its_first_checkpoint_a_run_has_left_nothing(tmp_path):
    claim(tmp_path, WANTED)
    (tmp_path / "scores.json").write_text("{}")
    claim(tmp_path, WANTED)
    assert (tmp_path / "scores.json").exists()
    claim(tmp_path, {**WANTED, "rate": 0.7})
    assert json.loads((tmp_path / "settings.json").read_text())["rate"] == 0.7
    assert not (tmp_path / "scores.json").exists(), "they are those of other settings"


@pytest.mark.parametrize("name", ["optimizer.pt", "checkpoint-3", "optimizer.pt/"])
def test_a_checkpoint_that_would_be_written_through_is_refused(tmp_path, name):
    """Trainer writes a checkpoint of the same step into the same files."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    claim(run, WANTED)
    inside = checkpoint(run, 3)
    if name == "checkpoint-3":
        inside.rename(precious)
        inside.symlink_to(precious)
    elif name == "optimizer.pt":
        precious.write_text("precious")
        (inside / name).symlink_to(precious)
    else:
        (inside / name).mkdir()
    with pytest.raises(ValueError, match=rf"output: expected the files of a checkpoint, got '.*{name[:12]}', .*remove"):
        claim(run, WANTED)


def test_a_finished_run(tmp_path):
    claim(tmp_path, WANTED)
    (tmp_path / "report.json").write_text(json.dumps({"settings": WANTED}))
    with pytest.raises(ValueError, match="whose run is finished"):
        claim(tmp_path, WANTED)
    claim(tmp_path, WANTED, finished=True)
    with pytest.raises(ValueError, match=r"rate: expected 0\.5"):
        claim(tmp_path, {**WANTED, "rate": 0.7}, finished=True)


def test_what_an_earlier_version_reported_is_known(tmp_path):
    """It noted no settings; of those that its report lacks any value will do."""
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"model": "m"}}))
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="model: expected 'm'"):
        claim(tmp_path, {"model": "other", "rate": 1}, finished=True)
    claim(tmp_path, WANTED, finished=True)


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda d: (d / "config.json").write_text("{}"), "which holds a model"),
        (lambda d: checkpoint(d, 3), "which holds checkpoint-3 of another run"),
        (
            lambda d: (d / "settings.json").write_text("[1]"),
            r"settings: expected named entries, got .1. in ",
        ),
        (lambda d: (d / "settings.json").write_text("{"), r"settings: expected JSON, got .* in .*settings\.json"),
    ],
)
def test_directories_of_something_else(tmp_path, prepare, message):
    prepare(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        claim(tmp_path, WANTED)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_only_named_like_a_checkpoint_and_a_file(tmp_path):
    claim(tmp_path / "run", WANTED)
    checkpoint(tmp_path / "run", "final")
    with pytest.raises(ValueError, match=r"expected only checkpoints named checkpoint-\* in .*, got checkpoint-final"):
        claim(tmp_path / "run", WANTED)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="expected a directory, got the file"):
        claim(tmp_path / "file", WANTED)
    assert (tmp_path / "file").read_text() == "precious"


def with_files(path, *names):
    for name in names:
        (path / name).touch()
    return path


# What a run that is killed leaves in a directory that was deleted meanwhile.
LEFT = {
    "an empty checkpoint": lambda d: checkpoint(d, 3, marker=None),
    "a begun one": lambda d: mark(with_files(checkpoint(d, 3, marker=None), "model.safetensors")),
    "its end": lambda d: with_files(checkpoint(d, 3, marker=None), "optimizer.pt", "rng_state.pth"),
    "whole ones": lambda d: [write_checksums(whole_checkpoint(d, step)) for step in (3, 6)],
    "late notes": lambda d: [
        mark(checkpoint(d, 3)),
        with_files(d, "scores.json"),
        (d / "settings.json").write_text('{"steps": 9, "scores_checksum": "ab"}'),
    ],
    "a temporary file": lambda d: mark(with_files(d, ".settings.json.0123abcd") and checkpoint(d, 3, marker=None)),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_run_wrote_after_its_directory_was_deleted_makes_way(left, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    LEFT[left](tmp_path / "run")
    assert begun_steps(tmp_path / "run") is None
    claim(tmp_path / "run", {**WANTED, "steps": 4})
    (line,) = caplog.messages
    assert "of a run whose directory was deleted: the run begins anew" in line and "checkpoint-3" in line
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".settings.json.0123abcd"}
    assert names == {"settings.json"}
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {**WANTED, "steps": 4}


@pytest.mark.parametrize("steps", ["3", True, 0, 1.5])
def test_a_number_of_steps_that_is_none_is_refused(steps, tmp_path):
    checkpoint(tmp_path, 3)
    (tmp_path / "settings.json").write_text(json.dumps({**WANTED, "steps": steps}))
    with pytest.raises(ValueError, match=r"steps: expected .*, got .* in .*settings\.json"):
        begun_steps(tmp_path)


FOREIGN = {
    "a model": lambda d: with_files(checkpoint(d, 3, marker=None), "config.json", "model.safetensors"),
    "one of Trainer": lambda d: with_files(checkpoint(d, 3), "config.json", "model.safetensors", "optimizer.pt"),
    "a note in one": lambda d: with_files(checkpoint(d, 3, marker=None), "optimizer.pt", "notes.txt"),
    "a note beside one": lambda d: mark(checkpoint(with_files(d, "notes.txt"), 3)),
    "another file of checksums": lambda d: (checkpoint(d, 3) / "checksums.json").write_text("[]"),
    "a model beside ours": lambda d: [mark(checkpoint(d, 3)), with_files(checkpoint(d, 4), "model.safetensors")],
    "settings": lambda d: [mark(checkpoint(d, 3)), (d / "settings.json").write_text('{"steps": 9, "lr": 1}')],
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_directory_with_checkpoints_of_somebody_else_stays_as_it_is(foreign, tmp_path):
    (tmp_path / "run").mkdir()
    FOREIGN[foreign](tmp_path / "run")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"expected a new directory, or that of an interrupted run, .* of another run"):
        claim(tmp_path / "run", WANTED)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_run_that_excludes_modules_is_not_resumed_by_one_that_does_not(tmp_path):
    for begun, resumed in ((["q_proj"], None), (None, ["q_proj"]), (["q_proj"], ["o_proj"])):
        directory = tmp_path / str(len([*tmp_path.iterdir()]))
        claim(directory, {"lr": 1, "include": None, "exclude": begun})
        (directory / "checkpoint-2").mkdir()
        claim(directory, {"lr": 1, "include": None, "exclude": begun})
        claim(directory, {"lr": 1})
        with pytest.raises(ValueError, match=re.escape(f"exclude: expected {begun!r}, as in the run")):
            claim(directory, {"lr": 1, "include": None, "exclude": resumed})


def test_a_run_of_an_earlier_version_has_no_choice_of_modules(tmp_path):
    claim(tmp_path, {"lr": 1})
    (tmp_path / "checkpoint-2").mkdir()
    claim(tmp_path, {"lr": 1, "include": None, "exclude": None})
    (tmp_path / "settings.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
        claim(tmp_path, {"lr": 1, "include": None, "exclude": ["q_proj"]})
