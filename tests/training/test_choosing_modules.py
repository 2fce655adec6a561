"""`include` and `exclude` in training: what is not chosen is bit-equal, what is chosen has moved."""

import pytest
import torch

from hf_cod import OwLoreAdamW, heal, owlore
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import METHODS, set_up
from tests.tiny_models import build

CHOSEN = {"include": r".*\.[123]\..*", "exclude": ["q_proj", "mlp.up_proj"]}


def is_chosen(name):
    """Of a parameter's name; norms train in the layers with chosen matrices."""
    return ".layers.0." not in name and not any(part in name for part in ("q_proj", "up_proj"))


def trained(model, optimizer, steps=12):
    for step in range(steps):
        ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def settings(**more):
    return OwLoreSettings(n_active=2, interval=2, rank=4, **more)


@pytest.mark.parametrize("method", METHODS)
def test_only_chosen_matrices_train(method):
    if METHODS[method].adapters:
        pytest.importorskip("peft")
    how = settings(**CHOSEN)
    model, original = build("llama"), build("llama")
    wrapped, optimizer = set_up(method, model, None, how, 1e-2, 4)
    trained(wrapped, optimizer)
    after = wrapped.merge_and_unload() if METHODS[method].adapters else wrapped
    before = dict(original.named_parameters())
    moved = {name for name, p in after.named_parameters() if ".layers." in name and not torch.equal(p, before[name])}
    expected = {name for name in before if ".layers." in name and is_chosen(name)}
    if METHODS[method].adapters:
        expected = {name for name in expected if "norm" not in name}
    assert moved == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_named_by_bank(family):
    model, original = build(family), build(family)
    trained(model, OwLoreAdamW(model, lr=1e-2, settings=settings(exclude=["experts"])))
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        if ".experts." in name:
            assert torch.equal(p, q), name
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, original.model.layers[0].self_attn.q_proj.weight
    )


def test_a_released_model_trains_in_full_again():
    model = build("llama")
    OwLoreAdamW(model, settings=settings(exclude=["q_proj"])).release()
    assert all(p.requires_grad for p in model.model.layers.parameters())


def test_a_state_of_another_choice_is_refused():
    states = OwLoreAdamW(build("llama"), settings=settings(exclude=["q_proj"])).state_dict()
    OwLoreAdamW(build("llama"), settings=settings(exclude=["q_proj"])).load_state_dict(states)
    with pytest.raises(ValueError, match=r"exclude: expected \['q_proj'\] as in the checkpoint, got \['o_proj'\]"):
        OwLoreAdamW(build("llama"), settings=settings(exclude=["o_proj"])).load_state_dict(states)
    with pytest.raises(ValueError, match=r"exclude: expected \['q_proj'\] as in the checkpoint, got None"):
        OwLoreAdamW(build("llama"), settings=settings()).load_state_dict(states)


def test_names_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="include: expected names of the layers' matrices, such as q_proj"):
        OwLoreAdamW(build("llama"), include=["qproj"])
    with pytest.raises(ValueError, match="include: expected "):
        owlore(include=[])


def test_adapters_have_a_choice_of_their_own():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"exclude: expected none in a model with adapters, .* exclude_modules"):
        OwLoreAdamW(model, rank=None, exclude=["q_proj"])


@pytest.mark.parametrize("method", ["owlore", "lora", "full"])
def test_healing_takes_a_choice(method):
    if METHODS[method].adapters:
        pytest.importorskip("peft")
    student, teacher = build("llama"), build("llama", layers=4)
    with torch.no_grad():
        for number, p in enumerate(student.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    windows = torch.randint(3, 99, (60, 16), generator=torch.Generator().manual_seed(0))
    how = settings(exclude=["q_proj"]) if method == "owlore" else OwLoreSettings(exclude=["q_proj"])
    sizes = {"sequence_length": 16, "eval_samples": 4, "batch_size": 2, "micro_batch_size": 2}
    report = heal(student, teacher, data=windows, method=method, steps=4, sampling=how, **sizes)
    assert report.settings["exclude"] == ["q_proj"]
    assert any("4 matrices" in note and "are not trained" in note for note in report.notes)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert any("k_proj" in name for name in moved) and not [name for name in moved if "q_proj" in name]
