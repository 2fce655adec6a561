"""A training resumes from a checkpoint only if its weights and optimizer state are those of its own model."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.saved_moments import layouts
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.checkpoint_checksums import CHECKSUMS, write_checksums
from hf_cod.training.runs.interrupt import SaveOnInterrupt
from hf_cod.training.runs.methods import METHODS
from hf_cod.training.runs.trainer import train
from hf_cod.training.runs.training_settings import TrainingSettings
from tests.tiny_models import build

SAMPLING = OwLoreSettings(n_active=2, interval=3, rank=2)
WEIGHTS = {"full": "model", "owlore": "model", "lora": "adapter_model", "owlore-peft": "adapter_model"}


def trained(method, folder, lora_rank=2, family="llama", every=1, interval=3, **sizes):
    """The weights after a training, which resumes if the folder has checkpoints."""
    sampling = replace(SAMPLING, interval=interval) if method in ("owlore", "owlore-peft") else OwLoreSettings()
    settings = TrainingSettings(
        method=method,
        steps=4,
        save_every=every,
        log_every=every,
        batch_size=2,
        micro_batch_size=2,
        sequence_length=16,
        learning_rate=1e-2,
        **({"lora_rank": lora_rank} if method == "lora" else {}),
    )
    model, optimizer = METHODS[method].setup(build(family, **sizes), None, sampling, 1e-2, lora_rank)
    windows = torch.randint(3, 20, (8, 16), generator=torch.Generator().manual_seed(0))
    train(model, optimizer, windows, settings, 0, folder)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method -> (the folder of a run with its last two checkpoints, its weights)."""
    made = {}

    def run(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            made[method] = folder, trained(method, folder)
        return made[method]

    return run


def state(change):
    def damage(folder, name):
        path = folder / "optimizer.pt"
        saved = torch.load(path, weights_only=False)
        change(saved)
        torch.save(saved, path)

    return damage


def scheduler(**changes):
    def damage(folder, name):
        path = folder / "scheduler.pt"
        torch.save({**torch.load(path, weights_only=False), **changes}, path)

    return damage


def trainer_state(**changes):
    def damage(folder, name):
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def weights(change):
    def damage(folder, name):
        path = folder / f"{name}.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return damage


def each(change):
    def damage(saved):
        for moments in saved["state"].values():
            moments.update({name: change(value) for name, value in moments.items()})

    return state(damage)


DAMAGES = {
    "emptied": state(lambda saved: saved.update(state={})),
    "more": state(lambda saved: saved.update(more=1)),
    "group": state(lambda saved: saved["param_groups"].pop()),
    "rate": state(lambda saved: [group.update(lr=float("nan")) for group in saved["param_groups"]]),
    "betas": state(lambda saved: [group.pop("betas") for group in saved["param_groups"]]),
    "text": each(lambda value: "x"),
    "int8": each(lambda value: value.to(torch.int8)),
    "shapes": each(lambda value: value.reshape(-1)[:1].clone() if value.ndim else value),
    "nan": each(lambda value: value * float("nan") if value.ndim and value.is_floating_point() else value),
    "rate of another step": state(lambda saved: [group.update(lr=1e-9) for group in saved["param_groups"]]),
    "schedule": scheduler(last_epoch=1, _step_count=2),
    "batch": trainer_state(train_batch_size=None),
    "logging": trainer_state(logging_steps=0),
    "callbacks": trainer_state(stateful_callbacks={}),
    "log": trainer_state(log_history=[{"step": 99, "loss": 1.0}]),
    "log of fewer steps": trainer_state(log_history=[{"step": 1, "loss": 1.0}]),
    "log twice": trainer_state(log_history=[{"step": step, "loss": 1.0} for step in (1, 2, 3, 4) * 2]),
    "log below 0": trainer_state(log_history=[{"step": step, "loss": -5.0} for step in (1, 2, 3, 4)]),
    "logging less often": trainer_state(logging_steps=3),
    "saving less often": trainer_state(save_steps=10**9),
    "weights nan": weights(lambda found: {name: value * float("nan") for name, value in found.items()}),
    "weights less": weights(lambda found: dict([*found.items()][1:])),
    "weights more": weights(lambda found: {**found, "extra": torch.ones(1)}),
    "weights none": weights(lambda found: {}),
    "weights flat": weights(lambda found: {name: value.reshape(1, -1) for name, value in found.items()}),
    "weights half": weights(lambda found: {name: value.half() for name, value in found.items()}),
}

# What is checked against the method's optimizer and weights; the rest is the same code for all methods.
OF_EACH_METHOD = ("shapes", "weights less", "rate of another step", "schedule")


def copied(source, folder, step):
    """A run that was interrupted after this step."""
    for kept in (step - 1, step):
        shutil.copytree(source / f"checkpoint-{kept}", folder / f"checkpoint-{kept}")
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize("method", WEIGHTS)
def test_checkpoints_of_the_same_run_are_taken(method, runs, tmp_path, caplog):
    folder, expected = runs(method)
    shutil.rmtree(copied(folder, tmp_path, 4))
    found = trained(method, tmp_path)
    assert not [line for line in caplog.messages if "damaged" in line]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "method, damage",
    [
        *[("owlore", damage) for damage in DAMAGES],
        *[(method, damage) for method in ("full", "lora") for damage in OF_EACH_METHOD],
        *[("owlore-peft", damage) for damage in DAMAGES if damage.startswith("weights") or damage == "shapes"],
        *[pytest.param("lora", damage, marks=pytest.mark.slow) for damage in DAMAGES if damage not in OF_EACH_METHOD],
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(method, damage, runs, tmp_path, caplog):
    """Also if somebody computed the checksums again."""
    folder, expected = runs(method)
    newest = copied(folder, tmp_path, 4)
    DAMAGES[damage](newest, WEIGHTS[method])
    write_checksums(newest)
    found = trained(method, tmp_path)
    (line,) = [line for line in caplog.messages if "damaged" in line]
    assert "checkpoint-4 is damaged" in line and "resumes from checkpoint-3" in line
    assert all(torch.equal(found[name], expected[name]) for name in found)


def flipped(path):
    """Changes one bit in the last number of a file, which stays valid."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


# What the other checks accept: they are possible, but those of another training.
EDITS = {
    "a bit of weights": lambda folder: flipped(folder / "adapter_model.safetensors"),
    "moments": lambda folder: each(lambda value: value * 2 if value.ndim else value)(folder, ""),
    "loss": lambda folder: trainer_state(log_history=[{"step": n, "loss": 1.0} for n in (1, 2, 3, 4)])(folder, ""),
    "a new file": lambda folder: (folder / "other.safetensors").write_bytes(b""),
    "a missing file": lambda folder: (folder / "adapter_config.json").unlink(),
    "checksums of something else": lambda folder: (folder / CHECKSUMS).write_text("[]"),
    "checksums of no text": lambda folder: (folder / CHECKSUMS).write_text('{"format": 1, "sha256": {"x": 1}}'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_checkpoint_gives_way_to_the_one_before(edit, runs, tmp_path, caplog):
    folder, expected = runs("lora")
    EDITS[edit](copied(folder, tmp_path, 4))
    found = trained("lora", tmp_path)
    (line,) = [line for line in caplog.messages if "damaged" in line]
    assert "checkpoint-4 is damaged" in line and "resumes from checkpoint-3" in line and "\n" not in line
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(runs, tmp_path, caplog):
    folder, expected = runs("lora")
    newest = copied(folder, tmp_path, 4)
    shutil.rmtree(newest)
    (tmp_path / "checkpoint-3" / CHECKSUMS).unlink()
    found = trained("lora", tmp_path)
    assert "damaged" not in caplog.text and (newest / CHECKSUMS).is_file()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_is_interrupted_twice_between_two_records(runs, tmp_path, caplog, monkeypatch):
    """Each time it logs the loss, and saves."""
    _, expected = runs("full")
    stop = SaveOnInterrupt.on_step_end

    def asked_at(step):
        def ended(self, args, state, control, **about):
            self.asked = signal.SIGINT if state.global_step == step else None
            stop(self, args, state, control, **about)

        return ended

    for step in (1, 2, 3):
        monkeypatch.setattr(SaveOnInterrupt, "on_step_end", asked_at(step))
        with pytest.raises(KeyboardInterrupt):
            trained("full", tmp_path, every=10)
    monkeypatch.undo()
    found = trained("full", tmp_path, every=10)
    assert "damaged" not in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_optimizer_of_another_rank(runs, tmp_path, caplog):
    folder, expected = runs("lora")
    trained("lora", tmp_path / "other", lora_rank=1)
    newest = copied(folder, tmp_path / "run", 4)
    shutil.copy(tmp_path / "other" / "checkpoint-4" / "optimizer.pt", newest)
    write_checksums(newest)
    found = trained("lora", tmp_path / "run")
    assert "resumes from checkpoint-3" in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("method", ["full", "lora", "owlore", "owlore-peft"])
def test_the_experts_of_a_mixture_resume(method, tmp_path, caplog):
    """In the middle of an interval, in which most experts have had no token, and so have no basis yet."""
    few = {"family": "mixtral", "interval": 2, "num_local_experts": 64, "num_experts_per_tok": 1}
    expected = trained(method, tmp_path, **few)
    shutil.rmtree(tmp_path / "checkpoint-4")
    if method == "owlore-peft":
        saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
        bases = [P.flatten(1).any(1) for name, P in saved.items() if ".experts." in name and name.endswith(".P")]
        assert len(bases) == 4 and all(P.any() and not P.all() for P in bases)
    found = trained(method, tmp_path, **few)
    assert "damaged" not in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("moments, least", [("float32", 4096), ("8bit", 32)])
def test_layouts_are_those_of_a_step(moments, least, monkeypatch):
    monkeypatch.setattr("hf_cod.training.owlore.eight_bit.LEAST", least)
    model = build("llama")
    optimizer = OwLoreAdamW(model, n_active=4, rank=2, moments=moments)
    model(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
    optimizer.step()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, expected in zip(parameters, layouts(optimizer), strict=True):
        found = {name: (value.dtype, tuple(value.shape)) for name, value in optimizer.state[parameter].items()}
        assert found == expected
