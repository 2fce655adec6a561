import pytest
import torch

from hf_cod import drop, factorize, find_decoder_layers, prune
from hf_cod.io.models import embedded_model, load_model
from hf_cod.training.healing.matching import match_layers
from tests.tiny_models import batch_for, build


def matched(student, teacher, told=None):
    return match_layers(find_decoder_layers(student), find_decoder_layers(teacher), told)


def with_norms_of_their_own(model):
    """As trained models have them; those of new ones are all alike."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo", "mixtral"])
def test_weights_tell_what_was_dropped(family):
    student, teacher = (with_norms_of_their_own(build(family, layers=6)) for _ in range(2))
    drop(student, [1, 4])
    if family == "llama":
        prune(student, 0.5, batches=[batch_for(student)])
    if family == "gpt2":
        factorize(student, 0.7, batches=[batch_for(student)])
    found = matched(student, teacher)
    assert found.layers == [0, 2, 3, 5] and found.how == "by nearest weights"


def test_our_own_models_tell_themselves():
    student, teacher = (load_model(embedded_model("lns"))[0] for _ in range(2))
    drop(student, [3, 4, 9])
    with torch.no_grad():
        for p in student.parameters():
            p.normal_()
    found = matched(student, teacher)
    assert found.layers == [0, 1, 2, 5, 6, 7, 8, 10, 11] and found.how == "by the student's config"


def test_where_nothing_tells_layers_are_spread_evenly():
    student, teacher = build("llama", layers=3), build("llama", layers=7)
    with torch.no_grad():
        for p in student.parameters():
            p.fill_(0.5)
    found = matched(student, teacher)
    assert found.layers == [1, 4, 6] and found.how.startswith("evenly by depth")
    assert matched(student, teacher, [0, 3, 5]).layers == [0, 3, 5]
    assert matched(teacher, build("llama", layers=7)).layers == list(range(7))
    for told in ([0, 1], [0, 0, 3], [2, 1, 3], [0, 1, 7], [-1, 1, 2]):
        with pytest.raises(
            ValueError, match=r"teacher_layers: expected 3 of the teacher's layers 0..6 in ascending order"
        ):
            matched(student, teacher, told)
    with pytest.raises(ValueError, match="student: expected at most the teacher's 3 layers, got 7"):
        matched(teacher, student)
