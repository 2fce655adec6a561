import json
from pathlib import Path

from hf_cod.analysis.monitoring.health import DEAD_FOR, EARLIER, find_trouble


def line(step=1, **rows):
    return {
        "step": step,
        "gradient_norm": [1.0, 2.0, 3.0],
        "angular_distance": [0.3, 0.1, 0.1],
        "variance": [1.0, 2.0, 9.0],
        **rows,
    }


def test_sound_layers_are_left_in_peace():
    assert find_trouble([]) == {}
    assert find_trouble([line(step) for step in range(9)]) == {}
    first = line(1, variance=[1e-5, 1e-5, 1e-5], angular_distance=[0.0, 0.0, 0.0])
    assert find_trouble([first, line(2), line(3), line(4)]) == {}, "an untrained model is no measure"


def test_a_real_training_is_left_in_peace():
    """The embedded Pre-LN model's own first 1,900 steps, every 100th: its variance grows five-thousandfold."""
    text = (Path(__file__).parent / "pair_history.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(entry) for entry in text.splitlines()]
    assert lines[-1]["variance"][0] > 1000 * lines[0]["variance"][0]
    for every in (1, 2, 4):
        thinned = lines[:1] + lines[every::every]
        assert all(find_trouble(thinned[:end]) == {} for end in range(len(thinned) + 1))


def test_a_layer_that_turns_nothing_is_dead_after_a_while():
    lines = [line(step, angular_distance=[0.3, 0.0005, 0.1]) for step in range(DEAD_FOR)]
    assert find_trouble(lines[:-1]) == {}
    assert list(find_trouble(lines)) == [("angle", 1)]
    assert "layer 1 seems dead: it turns the hidden state by 0.0005" in find_trouble(lines)["angle", 1]
    assert find_trouble([*lines, line()]) == {}, "it woke up"


def test_a_layer_without_gradient_is_dead_but_a_frozen_one_is_not():
    assert list(find_trouble([line(gradient_norm=[1e-4, 1.0, 1.0])] * DEAD_FOR)) == [("gradient", 0)]
    assert find_trouble([line(gradient_norm=[None, 1.0, 1.0])] * DEAD_FOR) == {}
    assert find_trouble([line(gradient_norm=[None, None, None])] * DEAD_FOR) == {}
    assert find_trouble([line(gradient_norm=None)] * DEAD_FOR) == {}
    assert len(find_trouble([line(gradient_norm=[0.0, 0.0, 0.0])] * DEAD_FOR)) == 3


def test_a_variance_that_explodes():
    exploded = line(50, variance=[1.0, 201.0, 900.0])
    assert find_trouble([line()] * (EARLIER - 1) + [exploded]) == {}
    assert list(find_trouble([line()] * EARLIER + [exploded])) == [("variance", 1)]


def test_a_probe_that_failed_is_told_and_does_not_hide_the_rest():
    failed = {"step": 7, "gradient_norm": [None] * 3, "failure": "activations: infinite"}
    assert find_trouble([line()] * 5 + [failed]) == {("failure", -1): "step 7: activations: infinite"}
    assert find_trouble([line()] * 5 + [failed] * 5 + [line()]) == {}
    assert find_trouble([line(variance=[None, 1.0, 1.0])] * 9) == {}
