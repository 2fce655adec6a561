import re

from hf_cod.compression.export.plan import ExportPlan
from hf_cod.compression.export.rules import expressions, most_common

NAMES = [f"model.layers.{i}.mlp.{name}" for i in (0, 1, 10) for name in ("up_proj", "down_proj")]


def plan(widths):
    sizes = dict.fromkeys(NAMES, (8, 8)) | {"model.layers.0.mlp.up_proj": (8, 80)}
    return ExportPlan(widths, sizes, {}, {}, {}, None, "owl")


def test_expressions_match_these_names_and_no_others():
    chosen = [NAMES[0], NAMES[3], NAMES[4]]
    found = expressions([*chosen, "lm_head"])
    assert len(found) == 3
    others = [
        *NAMES,
        "lm_head",
        "model.layers.11.mlp.up_proj",
        "a.model.layers.0.mlp.up_proj",
        "model_layers.0.mlp.up_proj",
    ]
    assert [name for name in others if any(re.match(rule, name) for rule in found)] == [*chosen, "lm_head"]


def test_the_width_of_most_weights():
    widths = dict.fromkeys(NAMES, 4) | {NAMES[0]: 3}
    assert most_common(plan(widths)) == 3, "its matrix has more weights than the others together"
    assert most_common(plan({NAMES[1]: 4, NAMES[2]: 3})) == 3, "of equally many the smaller one"
