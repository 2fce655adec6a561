"""Settings that fit a memory, on the embedded LNS model, by real estimates."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from hf_cod.cli.commands.finetune_memory import estimate as estimate_of
from hf_cod.io.models import embedded_model
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.memory import Memory
from hf_cod.training.runs.training_settings import TrainingSettings
from hf_cod.training.runs.within_memory import RESERVE, choose_within

ROOM = 10**12
SETTINGS = TrainingSettings(sequence_length=64)


def by_bytes(settings, sampling):
    """Estimates that a table could hold, so that limits between them can be told."""
    activations = settings.micro_batch_size * (20 if settings.checkpointing else 100)
    return Memory(1000, 0, (100 if settings.method == "lora" else 20) * sampling.n_active, activations, 0, 0)


def chosen(room, settings=SETTINGS, sampling=None):
    found = choose_within(round(room / (1 - RESERVE)) + 1, settings, sampling or OwLoreSettings(), None, by_bytes)
    told = found.settings
    return told.method, told.micro_batch_size, told.checkpointing, found.sampling.n_active, len(found.why)


@pytest.mark.parametrize(
    "room, expected",
    [
        (1900, ("lora", 4, False, 5, 1)),
        (1890, ("lora", 2, False, 5, 2)),
        (1600, ("lora", 1, False, 5, 2)),
        (1599, ("lora", 4, True, 5, 2)),
        (1520, ("lora", 1, True, 5, 3)),
        (1510, ("owlore", 4, False, 5, 2)),
        (1200, ("owlore", 1, False, 5, 3)),
        (1120, ("owlore", 1, True, 5, 4)),
        (1110, ("owlore", 2, True, 2, 5)),
        (1040, ("owlore", 1, True, 1, 5)),
    ],
)
def test_time_is_spent_before_quality(room, expected):
    assert chosen(room) == expected


def test_what_a_user_gave_stays():
    assert chosen(1510, replace(SETTINGS, method="owlore"))[:2] == ("owlore", 4)
    assert chosen(1180, sampling=OwLoreSettings(n_active=4))[0] == "owlore"  # which lora refuses
    assert chosen(1900, replace(SETTINGS, checkpointing=True))[2]
    assert (
        chosen(1280, sampling=OwLoreSettings(fused=True, n_active=3), settings=replace(SETTINGS, batch_size=4))[1] == 4
    )
    with pytest.raises(ValueError, match=r"memory: expected a training that fits 1e-06 GB, .* got owlore requires"):
        choose_within(1000, replace(SETTINGS, method="owlore"), OwLoreSettings(), None, by_bytes)


def test_the_choice_fits_by_the_estimate():
    config = AutoConfig.from_pretrained(embedded_model("lns"))

    def estimate(settings, sampling):
        return estimate_of(config, settings.method, settings, sampling)

    whole = choose_within(ROOM, SETTINGS, OwLoreSettings(), None, estimate)
    assert whole.settings.method == "lora" and len(whole.why) == 1
    room = whole.memory.total  # of which a part stays free
    found = choose_within(room, SETTINGS, OwLoreSettings(), None, estimate)
    assert found.memory.total <= room * (1 - RESERVE) < whole.memory.total
    assert found.memory == estimate(found.settings, found.sampling) and found.settings.micro_batch_size < 4
