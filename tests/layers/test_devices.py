"""Where inputs go."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from hf_cod.layers.devices import check_in_memory, environment_of, execution_device, to_device


def test_the_first_weight_that_has_a_device():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert execution_device(model) == torch.device("cpu")
    with pytest.raises(ValueError, match="model: expected weights, got a model on the meta device"):
        execution_device(model[:1])


def test_a_hook_of_offloaded_weights_decides():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._hf_hook = SimpleNamespace(execution_device="meta")
    assert execution_device(model) == torch.device("meta")


def test_weights_on_the_meta_device_are_named_unless_accelerate_loads_them(tmp_path):
    half = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"up": nn.Linear(2, 2, device="meta")}))
    with pytest.raises(ValueError, match=r"model: expected weights in memory, got .* device, 1\.up\.weight; load"):
        check_in_memory(half)
    check_in_memory(cpu_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    for place_submodules in (False, True):
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        if place_submodules:
            model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
            hook = AlignDevicesHook("cpu", offload=True, weights_map=model[0].state_dict(), place_submodules=True)
            add_hook_to_module(model[0], hook)
        assert all(p.is_meta for p in model.parameters())
        check_in_memory(model)


def test_the_environment_states_device_and_dtype_of_a_model():
    found = environment_of(nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)))
    assert (found["device"], found["dtype"], found["torch"]) == ("cpu", "bfloat16", torch.__version__)


def test_tensors_of_a_batch_move_and_flags_stay():
    batch = {"input_ids": torch.ones(1, 2), "use_cache": False, "labels": None}
    moved = to_device(batch, torch.device("meta"))
    assert moved["input_ids"].device.type == "meta" and moved["use_cache"] is False and moved["labels"] is None
    assert batch["input_ids"].device.type == "cpu"
