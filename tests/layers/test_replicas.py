"""Processes that train together end with the same bits, or all of them say in one line why they do not begin."""

import json

import pytest
import torch

from hf_cod.cli.main import main
from hf_cod.layers.replicas import digest_structure, digest_weights
from hf_cod.training.healing.healer import heal
from hf_cod.training.runs.methods import METHODS
from tests.replica_cases import METHODS as CASES
from tests.tiny_models import build
from tests.tiny_training import run_in_two_processes

REFUSED = {
    "seed": "seed: expected the same on all processes, got 0 on rank 0 and 1 on rank 1",
    "n_active": "n_active: expected the same on all processes, got 2 on rank 0 and 3 on rank 1",
    "interval": "interval: expected the same on all processes, got 2 on rank 0 and 3 on rank 1",
    "rank": "rank: expected the same on all processes, got 4 on rank 0 and 5 on rank 1",
    "lr": "lr: expected the same on all processes, got 0.001 on rank 0 and 0.002 on rank 1",
    "betas": "betas: expected the same on all processes, got [0.9, 0.99] on rank 0 and [0.9, 0.991] on rank 1",
    "scores": "scores: expected the same on all processes, got [",
    "r": "r: expected the same on all processes, got 4 on rank 0 and 5 on rank 1",
    "frozen": "model: expected the same on all processes",
    "in DDP": "model: expected one that is not yet in DistributedDataParallel, got one that is; create",
    "inside of DDP": "model: expected one that is not yet in DistributedDataParallel",
    "weights loaded later": "model's weights: expected the same on all processes",
    "rate changed later": "lr: expected the same on all processes",
    "not in DDP": "gradients: expected the same on all processes",
    "resumed differently": "steps: expected the same on all processes, got 1 on rank 0 and 2 on rank 1",
    "Trainer": "seed: expected the same on all processes, got 0 on rank 0 and 1 on rank 1",
}


def said(folder):
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.process
def test_all_methods_end_alike_from_weights_and_seeds_that_differ(tmp_path):
    run_in_two_processes("weights", tmp_path)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert len(first) == 2 * len(CASES)
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        differ = [key for key, value in tensors.items() if not torch.equal(value, second[name][key])]
        assert not differ, f"{name}: {differ}"


@pytest.mark.process
def test_processes_that_differ_are_refused_on_both(tmp_path):
    run_in_two_processes("differences", tmp_path)
    first, second = said(tmp_path)
    failure = "n_active: expected between 1 and"
    assert second["fails on one"].startswith(failure)
    assert first["fails on one"].startswith("processes: expected all to make an OwLoreAdamW, got a failure of rank 1: ")
    assert failure in first.pop("fails on one") and second.pop("fails on one")
    assert first == second
    assert "\n" not in "".join(first.values())
    assert first.pop("afterwards")
    assert first.keys() == REFUSED.keys()
    for name, line in REFUSED.items():
        assert first[name].startswith(line), f"{name}: {first[name]}"


@pytest.mark.process
def test_pretraining_begins_with_the_same_settings_on_both(tmp_path):
    run_in_two_processes("pretraining", tmp_path)
    first, second = said(tmp_path)
    assert (first.pop("before"), second.pop("before")) == ([], ["was-here-0"])
    assert first.pop("equal") == second.pop("equal")
    for field in ("seed", "steps", "output"):
        assert first[field] == second[field] and first[field].startswith(f"{field}: expected the same on all processes")
    assert "which holds a model" in first["claim"] and "which holds a model" in second["claim"]


@pytest.mark.process
def test_a_process_that_raises_in_a_step_ends_the_other(tmp_path):
    run_in_two_processes("fails", tmp_path)
    first, second = said(tmp_path)
    assert second.startswith("gradients: expected gradients of active layers, got none")
    assert first


@pytest.mark.process
def test_a_process_that_is_gone_ends_the_wait_for_its_gradient(tmp_path):
    run_in_two_processes("ends", tmp_path)
    told = json.loads((tmp_path / "said-0.json").read_text())
    assert told.startswith("processes: expected all to continue, got one that ended") and "\n" not in told


@pytest.mark.process
@pytest.mark.parametrize("how, status", [("raises", 1), ("killed", -9)])
def test_a_process_that_ends_in_a_training_ends_the_other_within_a_minute(how, status, tmp_path):
    """Trainer waits in DDP's collective, which has torch's limit of half an hour."""
    run_in_two_processes(f"{how}_in_training", tmp_path, statuses=(1, status))
    first, second = (float((tmp_path / f"time-{rank}").read_text()) for rank in range(2))
    assert 0 < first - second < 60


@pytest.mark.process
def test_a_process_that_never_comes_is_named(tmp_path):
    run_in_two_processes("stays_away", tmp_path)
    told = "processes: expected all 2 to make an OwLoreAdamW, got no answer in 1 seconds from rank 1"
    assert json.loads((tmp_path / "said-0.json").read_text()) == told


@pytest.mark.parametrize("method", METHODS)
def test_finetune_is_refused_in_several_processes_before_it_writes(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "run"
    assert main(["finetune", "no-model", "--method", method, "--output", str(output)]) == 2
    assert "expected one process" in capsys.readouterr().err
    assert not output.exists()


def test_heal_is_refused_in_several_processes_before_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "run"
    assert main(["heal", "no-model", "--teacher", "none", "--output", str(output)]) == 2
    assert "expected one process" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device: expected one process"):
        heal(build("llama"), build("llama"), torch.zeros(4, 8, dtype=torch.long), output=output)
    assert not output.exists()


def test_one_bit_of_a_weight_and_what_trains_tell_models_apart():
    model = build("llama")
    weights, structure = digest_weights(model), digest_structure(model)
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[3, 5] ^= 1
    assert digest_weights(model) != weights and digest_structure(model) == structure
    model.lm_head.requires_grad_(False)
    assert digest_structure(model) != structure
