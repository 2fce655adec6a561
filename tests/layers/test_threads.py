"""Two threads on one model: the second one is refused, and the first one's result is that of one thread."""

import threading

import pytest
import torch

from hf_cod import collect_statistics, diagnose, heal, prune, score_layers
from tests.tiny_models import batch_for, build, two_batches

HEAL = {"method": "full", "sequence_length": 8, "steps": 1, "batch_size": 4, "eval_samples": 2}
SECOND = {
    "diagnose": lambda model: diagnose(model, batches=two_batches(model)),
    "collect_statistics": lambda model: collect_statistics(model, two_batches(model)),
    "score_layers": lambda model: score_layers(model, method="angular", batches=two_batches(model)),
    "prune": lambda model: prune(model, 0.5, method="magnitude"),
    "prune by samples": lambda model: prune(model, 0.5, method="sparsegpt", batches=two_batches(model)),
    "a part": lambda model: diagnose(model.model, batches=two_batches(model)),
    "heal": lambda model: heal(model, build("llama"), torch.randint(3, 99, (8, 8)), **HEAL),
}


@pytest.mark.parametrize("name", SECOND)
def test_the_second_thread_is_refused_and_the_first_is_right(name):
    model, began, ended, found = build("llama"), threading.Event(), threading.Event(), []
    expected = collect_statistics(model, [batch_for(model)])

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
    assert found[0].squares.keys() == expected.squares.keys()
    for key, value in expected.squares.items():
        assert torch.equal(found[0].squares[key], value), key
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    SECOND[name](model)  # the model is free again
