"""A training resumes from the newest checkpoint that is whole and its own, and says which it left out, and why."""

import json
import pickle

import pytest
import torch

from hf_cod.training.runs.checkpoint_files import check_files
from hf_cod.training.runs.run_directory import last_checkpoint
from tests.training.runs.checkpoints import MARKER, whole_checkpoint

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


class Evil:
    """What a pickle may carry: it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        whole_checkpoint(tmp_path, step)
    return tmp_path


def test_the_newest_is_taken(run, caplog):
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-4" and not caplog.records


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"something else" * 100),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", STATES)
def test_a_damaged_file_gives_way_to_the_checkpoint_before(name, damage, run, caplog):
    DAMAGES[damage](run / "checkpoint-4" / name)
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2"
    (line,) = caplog.messages
    assert "checkpoint-4 is damaged" in line and "resumes from checkpoint-2" in line and "\n" not in line


@pytest.mark.parametrize("name", STATES[:3])
@pytest.mark.parametrize("what", ["evil", "other"])
def test_states_that_are_not_ours(name, what, run, caplog, tmp_path):
    written = tmp_path / "written"
    torch.save(Evil(written) if what == "evil" else {"other": torch.zeros(3)}, run / "checkpoint-4" / name)
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2" and len(caplog.messages) == 1
    (run / "checkpoint-4" / name).write_bytes(pickle.dumps(Evil(written)))
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2" and not written.exists()


@pytest.mark.parametrize("content", ["{}", "[]", '{"global_step": 2}', "{"])
def test_a_state_of_the_trainer_that_is_not_of_that_step(content, run, caplog):
    (run / "checkpoint-4" / MARKER).write_text(content)
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2" and len(caplog.messages) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"epoch": "x"},
        {"stateful_callbacks": "x"},
        {"log_history": [{"loss": 1.0}]},
        {"log_history": [{"step": 1, "loss": "x"}]},
    ],
    ids=str,
)
def test_entries_of_the_trainer_that_are_not_as_it_writes_them(change, run, caplog):
    path = run / "checkpoint-4" / MARKER
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2" and len(caplog.messages) == 1


def test_a_norm_of_gradients_that_is_nan_is_as_the_trainer_writes_it(run, caplog):
    path = run / "checkpoint-4" / MARKER
    state = json.loads(path.read_text())
    state["log_history"][0]["grad_norm"] = float("nan")
    path.write_text(json.dumps(state))
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-4" and not caplog.messages


@pytest.mark.parametrize(
    "name, change",
    [
        ("scheduler.pt", {"last_epoch": "x"}),
        ("scheduler.pt", {"last_epoch": 10**6}),
        ("scheduler.pt", {"step": "x"}),
        ("scheduler.pt", {"base_lrs": [float("nan")]}),
        ("rng_state.pth", {"cpu": torch.zeros(3, dtype=torch.uint8)}),
        ("rng_state.pth", {"python": "x"}),
        ("rng_state.pth", {"numpy": "x"}),
        ("rng_state.pth", {"cuda": torch.zeros(3)}),
    ],
    ids=str,
)
def test_states_with_other_values(name, change, run, caplog):
    path = run / "checkpoint-4" / name
    torch.save({**torch.load(path, weights_only=False), **change}, path)
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2"
    (line,) = caplog.messages
    assert f"damaged ({name.split('.')[0]}" in line


def test_a_checkpoint_without_its_last_file_is_left_out_in_silence(run, caplog):
    (run / "checkpoint-4" / MARKER).unlink()
    assert last_checkpoint(run, MARKER, check_files) == run / "checkpoint-2" and not caplog.messages


def test_with_none_that_is_whole_the_training_begins_anew_and_says_so(run, caplog):
    for step in (2, 4):
        cut(run / f"checkpoint-{step}" / "optimizer.pt")
    assert last_checkpoint(run, MARKER, check_files) is None
    assert len(caplog.messages) == 2 and all("starts from step 0" in line for line in caplog.messages)
