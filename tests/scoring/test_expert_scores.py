"""What a file of scores of experts may hold, and which model it fits."""

from dataclasses import replace

import pytest

from hf_cod import ExpertScores, find_decoder_layers
from tests.tiny_models import build, build_mixture

A, B = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
SCORES = ExpertScores(
    model="m",
    method="reap",
    values={A: [1.0, 0.5], B: [0.0, 2.0]},
    layers={A: 0, B: 1},
    tokens={A: [3, 4], B: [0, 7]},
    parameters={A: [6, 6], B: [6, 6]},
)


def test_experts_without_tokens():
    assert SCORES.unseen == {B: [0]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": {}}, "values: expected scores of at least one mixture"),
        ({"values": {A: [1.0], B: [0.0, 2.0]}}, r"values: expected as many for model.layers.0.mlp.experts"),
        ({"values": {A: [1.0, float("nan")], B: [0.0, 2.0]}}, "expert_scores: expected finite numbers, got NaN"),
        ({"layers": {A: 0}}, "layers: expected those of"),
        ({"tokens": {A: [3, -4], B: [0, 7]}}, "tokens.*: expected a whole number of at least 0, got -4"),
        ({"values": {A: ["x", 1.0], B: [0.0, 2.0]}}, "values.*: expected a finite number, got 'x'"),
    ],
)
def test_what_cannot_be(changes, message, tmp_path):
    import json

    SCORES.save(tmp_path / "good.json")
    content = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=message):
        ExpertScores.load(tmp_path / "bad.json")


def test_they_are_of_one_model(caplog):
    model = build_mixture("mixtral")
    stack = find_decoder_layers(model)
    sets = {experts.name: experts for i in range(4) for experts in stack.expert_sets(i)}
    right = ExpertScores(
        "MixtralForCausalLM",
        "frequency",
        values={name: [0.5] * 4 for name in sets},
        layers={name: stack.index_of(name) for name in sets},
        tokens={name: [1] * 4 for name in sets},
        parameters={name: experts.sizes() for name, experts in sets.items()},
    )
    right.check(stack)
    assert not caplog.records
    replace(right, model="other").check(stack)
    assert "expert_scores: used on MixtralForCausalLM, but computed for other" in caplog.text
    with pytest.raises(ValueError, match=r"expert_scores: expected 4 experts of 9216 weights in .*got 2 experts of 6"):
        replace(SCORES).check(stack)
    with pytest.raises(ValueError, match=r"expert_scores: expected no experts in model.layers.0"):
        SCORES.check(find_decoder_layers(build("llama")))
