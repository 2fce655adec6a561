"""Signals that stop a training; tests/cli/commands/test_finetune.py stops a run and resumes it."""

import os
import signal
from types import SimpleNamespace

import pytest

from hf_cod.io.interruption import Terminated
from hf_cod.training.runs.interrupt import SaveOnInterrupt

ALONE = SimpleNamespace(world_size=1)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}  # workers of xdist ignore one
    yield request.param
    for each, handler in before.items():
        signal.signal(each, handler)


def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(number, capfd):
    before = signal.getsignal(number)
    interrupt, control = SaveOnInterrupt(), SimpleNamespace(should_log=False, should_save=False)
    interrupt.on_train_begin(ALONE)
    interrupt.on_step_end(None, None, control)
    assert not interrupt.asked and not control.should_save
    os.kill(os.getpid(), number)
    interrupt.on_step_end(None, None, control)
    assert interrupt.asked == number and control.should_log and control.should_save and control.should_training_stop
    assert signal.getsignal(number) == before  # the second one stops at once
    assert "saving a checkpoint after this step" in capfd.readouterr().err
    with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt):
        interrupt.raise_asked()


@pytest.mark.parametrize("known", [signal.SIG_IGN, None])
def test_a_signal_that_is_ignored_or_of_an_unknown_handler_is_left_alone(known, number, monkeypatch):
    before = signal.getsignal(number)
    if known is None:
        monkeypatch.setattr(signal, "getsignal", lambda number: None)  # what is not Python's
    else:
        signal.signal(number, known)
    interrupt = SaveOnInterrupt()
    interrupt.on_train_begin(ALONE)
    monkeypatch.undo()
    assert signal.getsignal(number) is (before if known is None else known)
    interrupt.close()


def test_several_processes_keep_their_handlers(number):
    before = signal.getsignal(number)
    SaveOnInterrupt().on_train_begin(SimpleNamespace(world_size=2))
    assert signal.getsignal(number) == before
