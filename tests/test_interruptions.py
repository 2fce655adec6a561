"""A few of the trials of `interruptions.py`: a kill of each command, full disks, deleted directories."""

import random

import pytest

from hf_cod.cli.main import COMMANDS
from tests.interrupted import RESUMED, RUNS, Ground
from tests.interruptions import delete, fill, interrupt, kill
from tests.small_disks import can_mount

pytestmark = [pytest.mark.slow, pytest.mark.process]
# The first run of each command; `test_same_bytes.py` and the long version have all.
FIRST = {
    command: next(run for run in RUNS if RUNS[run].split()[0] == command) for command in COMMANDS if command != "env"
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("interrupted"))


def check(ground, draw, number, names):
    told = []
    counts = interrupt(ground, draw, number, names, random.Random(0), told.append)
    wrong = [line for line in told if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) >= number


@pytest.mark.parametrize("name", FIRST.values())
def test_a_killed_command_ends_as_if_it_had_not_been(name, ground):
    check(ground, kill, 1, [name])


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("name", ["quantize", "finetune-owlore", "diagnose"])
def test_a_full_disk(name, ground):
    check(ground, fill, 1, [name])


@pytest.mark.parametrize("name", ["quantize", "finetune-owlore", "diagnose"])
def test_a_deleted_output(name, ground):
    check(ground, delete, 1, [name])


@pytest.mark.parametrize("name", ["heal", "heal-lora", "finetune-owlore", "finetune-full"])
def test_an_output_deleted_while_a_checkpoint_is_written_by_a_run_that_is_killed_then(name, ground):
    assert ground.lost(name) == RESUMED
