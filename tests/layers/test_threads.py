"""Two threads on one model: the second one is refused, and the first one's result is that of one thread."""

import copy
import gc
import threading
from weakref import ref

import pytest
import torch
from torch import nn

from hf_cod import (
    apply_steps,
    collect_statistics,
    diagnose,
    drop,
    drop_experts,
    drop_layers,
    factorize,
    heal,
    narrow,
    pack_sparse,
    prune,
    quantize,
    recover,
    repeat,
    repeat_layers,
    score_experts,
    score_layers,
    skip,
)
from hf_cod.layers.modes import one_thread
from tests.tiny_models import batch_for, build, two_batches

HEAL = {"method": "full", "sequence_length": 8, "steps": 1, "batch_size": 4, "eval_samples": 2}
SECOND = {
    "diagnose": lambda model: diagnose(model, batches=two_batches(model)),
    "collect_statistics": lambda model: collect_statistics(model, two_batches(model)),
    "score_layers": lambda model: score_layers(model, method="angular", batches=two_batches(model)),
    "prune": lambda model: prune(model, 0.5, method="magnitude"),
    "prune by samples": lambda model: prune(model, 0.5, method="sparsegpt", batches=two_batches(model)),
    "prune by statistics": lambda model: prune(model, 0.5, statistics=collect_statistics(model, two_batches(model))),
    "drop": lambda model: drop(model, 1),
    "skip": lambda model: skip_one(model),
    "repeat": lambda model: repeat(model, 1, 2),
    "repeat_layers": lambda model: repeat_layers(model, 1),
    "drop_layers": lambda model: drop_layers(model, [1]),
    "drop_layers with a map": lambda model: drop_layers(model, [1], "linear", batches=two_batches(model)),
    "drop_experts": lambda model: drop_experts(model, 0.5, batches=two_batches(model)),
    "score_experts": lambda model: score_experts(model, batches=two_batches(model)),
    "narrow": lambda model: narrow(model, 0.7, "magnitude", "none"),
    "narrow by samples": lambda model: narrow(model, 0.7, batches=two_batches(model)),
    "factorize": lambda model: factorize(model, 0.7, "plain"),
    "factorize by samples": lambda model: factorize(model, 0.7, batches=two_batches(model)),
    "quantize": lambda model: quantize(model, bits=4),
    "quantize by samples": lambda model: quantize(model, bits=4, batches=two_batches(model)),
    "pack_sparse": lambda model: pack_sparse(model, 0.0),
    "apply_steps": lambda model: apply_steps(model, {"sparsity": 0.5}, batches=two_batches(model)),
    "recover": lambda model: recover(model, two_batches(model), 1),
    "a part": lambda model: diagnose(model.model, batches=two_batches(model)),
    "heal": lambda model: heal(model, build("llama"), torch.randint(3, 99, (8, 8)), **HEAL),
}


def skip_one(model):
    with skip(model, 1):
        pass


@pytest.mark.parametrize("name", SECOND)
def test_the_second_thread_is_refused_and_the_first_is_right(name):
    model = build("mixtral" if "experts" in name else "llama")
    began, ended, found = threading.Event(), threading.Event(), []
    expected, weights = collect_statistics(model, [batch_for(model)]), copy.deepcopy(model.state_dict())

    def wait(*_):
        began.set()
        ended.wait(60)

    def measure():
        found.append(collect_statistics(model, [batch_for(model)]))

    handle = model.register_forward_pre_hook(wait)
    handle_of_base = model.model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=measure, name="first")
    thread.start()
    try:
        assert began.wait(60)
        with pytest.raises(ValueError, match=r"model: expected a model that no other thread uses, got .* in 'first'"):
            SECOND[name](model)
    finally:
        ended.set()
        thread.join()
        handle.remove(), handle_of_base.remove()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert found[0].squares.keys() == expected.squares.keys()
    for key, value in expected.squares.items():
        assert torch.equal(found[0].squares[key], value), key
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    SECOND[name](model)  # the model is free again


def test_a_module_that_is_replaced_meanwhile_is_freed_at_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    earlier = ref(model[0])
    with one_thread(model):
        model[0] = nn.Linear(2, 2)
        gc.collect()
        assert earlier() is None
