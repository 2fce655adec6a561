"""Settings of trainings: what follows from what, and how many steps suit so many samples."""

import logging

import pytest
import torch

from hf_cod.training.healing.settings import HealSettings, RecoverySettings
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.run_directory import begun_steps, claim
from hf_cod.training.runs.training_data import split_windows
from hf_cod.training.runs.training_settings import TrainingSettings, for_samples, warn_of_one_draw

NAMES = ("batch_size", "micro_batch_size", "save_every", "log_every")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, (16, 4, 100, 10)),
        ({"batch_size": 2}, (2, 2, 100, 10)),
        ({"batch_size": 6}, (6, 3, 100, 10)),
        ({"batch_size": 7}, (7, 1, 100, 10)),
        ({"micro_batch_size": 8}, (16, 8, 100, 10)),
        ({"micro_batch_size": 6}, (18, 6, 100, 10)),
        ({"micro_batch_size": 32}, (32, 32, 100, 10)),
        ({"log_every": 6}, (16, 4, 96, 6)),
        ({"log_every": 250}, (16, 4, 250, 250)),
        ({"save_every": 25}, (16, 4, 25, 5)),
        ({"save_every": 7}, (16, 4, 7, 7)),
        ({"batch_size": 8, "micro_batch_size": 2, "save_every": 9, "log_every": 3}, (8, 2, 9, 3)),
    ],
)
@pytest.mark.parametrize("kind", [TrainingSettings, HealSettings])
def test_what_is_not_given_follows(kind, given, expected):
    settings = kind(**given)
    assert tuple(getattr(settings, name) for name in NAMES) == expected
    assert {name: settings.resolved()[name] for name in NAMES} == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size: expected batch_size 6 to be a multiple of it"),
        ({"save_every": 10, "log_every": 4}, "save_every: expected a multiple of log_every"),
        ({"passes": 0}, "passes: expected a number above 0, got 0"),
        ({"threshold": -1.0}, "threshold: expected a finite number above 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_what_is_given_and_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**given)


@pytest.mark.parametrize(
    "given, samples, steps, told",
    [
        ({}, 100_000, 300, None),
        ({}, 1_600, 300, None),  # three passes exactly
        ({}, 128, 24, "steps: 24 instead of the default 300: 3 passes over the 128 training samples"),
        ({"passes": 5.0}, 128, 40, "steps: 40 instead of the default 300: 5 passes over the 128 training samples"),
        ({}, 1, 1, "steps: 1 instead of the default 300"),
        ({"steps": 160}, 128, 160, None),  # twenty passes
        ({"steps": 300}, 128, 300, "steps: 300 are 38 passes over the 128 training samples"),
    ],
)
def test_steps_suit_the_samples(given, samples, steps, told, caplog):
    with caplog.at_level(logging.WARNING, "hf_cod"):
        chosen = for_samples(TrainingSettings(**given), samples)
    assert chosen.total_steps == steps == chosen.resolved()["steps"]
    assert caplog.messages == [] if told is None else caplog.messages[0].startswith(told)
    assert len(caplog.messages) <= 1


def test_tokens_are_taken_as_they_are(caplog):
    settings = HealSettings(tokens="2M")
    with caplog.at_level(logging.WARNING, "hf_cod"):
        assert for_samples(settings, 100).total_steps == settings.total_steps == 489
    assert caplog.messages[0].startswith("steps: 489 are 78 passes over the 100 training samples")


def test_a_run_that_goes_on_makes_the_steps_that_it_began_with(tmp_path):
    """Also one of a version whose default did not depend on the samples."""
    claim(tmp_path, {"seed": 0, "steps": 300})
    assert begun_steps(tmp_path) is None, "without a checkpoint it starts anew"
    (tmp_path / "checkpoint-10").mkdir()
    assert for_samples(TrainingSettings(), 128, begun_steps(tmp_path)).total_steps == 300
    assert for_samples(TrainingSettings(steps=5), 128, begun_steps(tmp_path)).total_steps == 5


def test_a_text_of_which_most_is_held_out_is_told_of(caplog):
    settings = TrainingSettings(eval_samples=6)
    with caplog.at_level(logging.WARNING, "hf_cod"):
        train, held_out = split_windows(torch.zeros(12, 3), settings)
        assert caplog.messages == [] and (len(train), len(held_out)) == (6, 6)
        train, held_out = split_windows(torch.zeros(10, 3), settings)
    assert (len(train), len(held_out)) == (4, 6)
    assert caplog.messages[0].startswith("eval_samples: 6 of 10 samples are held out, and only 4 are trained on")


def test_recovery_makes_as_many_steps_as_its_batches_bear(caplog):
    with caplog.at_level(logging.WARNING, "hf_cod"):
        assert RecoverySettings().steps_on(8) == 100 and RecoverySettings().steps_on(2) == 40
        assert RecoverySettings(steps=40).steps_on(2) == 40 and caplog.messages == []
        assert RecoverySettings(steps=100).steps_on(2) == 100
    assert caplog.messages[0].startswith("steps: 100 are 50 passes over the 2 training samples")


def test_settings_by_position_are_those_of_the_first_version():
    """`passes` is newer than what stands behind it, and is given by name alone."""
    settings = HealSettings("lora", "angular", 13.0, 1e-3, 7, 8, 2, 32)
    given = settings.steps, settings.batch_size, settings.micro_batch_size, settings.sequence_length
    assert given == (7, 8, 2, 32)


def test_a_step_of_many_passes_over_the_samples_is_refused():
    for batch_size in (2001, 10**12):
        settings = TrainingSettings(batch_size=batch_size, micro_batch_size=batch_size)
        with pytest.raises(ValueError, match=f"^batch_size: expected at most 20 times the 100 .* got {batch_size};"):
            for_samples(settings, 100)
    assert for_samples(TrainingSettings(batch_size=2000), 100).batch_size == 2000
    assert for_samples(TrainingSettings(steps=1), 1).batch_size == 16, "the default is never refused"


@pytest.mark.parametrize(
    "method, steps, n_active, warned",
    [
        ("owlore", 50, 2, True),
        ("lisa", 50, 2, True),
        ("owlore", 51, 2, False),  # the layers are sampled twice
        ("owlore", 50, 4, False),  # all layers are trained
        ("galore", 50, 2, False),
    ],
)
def test_a_training_that_samples_layers_once(method, steps, n_active, warned, caplog):
    sampling = OwLoreSettings(n_active=n_active, interval=50)
    with caplog.at_level(logging.WARNING, "hf_cod"):
        warn_of_one_draw(TrainingSettings(method=method, steps=steps), sampling, 4)
    found = [message.partition(";")[0] for message in caplog.messages]
    assert found == ["interval: layers are sampled once in 50 steps, so that 2 of 4 layers are trained"] * warned
