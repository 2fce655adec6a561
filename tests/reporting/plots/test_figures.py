"""Which pictures a report has, and how several reports share one."""

import warnings
from dataclasses import replace

import pytest
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex
from matplotlib.text import Text

from hf_cod.io.display import terminal_text
from hf_cod.reporting.plots import plot_comparison, plot_report
from hf_cod.reporting.plots.colours import INK
from hf_cod.reporting.plots.panels import PANELS
from tests.reporting.reports import report


def scored(*values):
    settings = {"method": "owl", "threshold": 5.0}
    return report(kind="score", settings=settings, layers={"score": [*values]}, results={"score_settings": {}})


def test_one_measure_is_one_picture_by_its_name(tmp_path):
    plot_report(scored(1.0, 2.0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["score.png"]


def test_a_panel_for_each_measure_in_two_columns(tmp_path):
    figure = plot_report(report(), tmp_path)
    assert len({round(axes.get_position().x0, 1) for axes in figure.axes[:4] if axes.axison}) >= 2
    for name in report().layers:
        assert name in PANELS and (tmp_path / f"{name}.png").is_file()


def test_heights_are_the_measure_and_the_largest_are_dark():
    axes = plot_report(scored(0.5, 0.1, 0.4, 0.2, 0.3)).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.1, 0.4, 0.2, 0.3]
    assert [to_hex(bar.get_facecolor()) == INK for bar in axes.patches] == [True, False, True, False, True]


def test_what_a_run_did_not_measure_is_said_in_its_place(tmp_path):
    other = report(layers={"gradient_norm": [1.0, 2.0]}, results={})
    figure = plot_comparison([report(), other], ["left", "right"], tmp_path)
    told = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "layer drop: not measured" in told and "gradient norm: not measured" not in told
    assert figure.axes[0].get_title().startswith("left\n") and (tmp_path / "compare.png").is_file()
    with pytest.raises(ValueError, match="runs: expected measures to plot, got none"):
        plot_comparison([report(layers={}, results={})], ["a"])


def test_a_dollar_in_a_name_is_no_formula():
    """Of a model, a label, a metric and a scores file."""
    name = "a$b$c"
    drop = {"metric": name, "lower_is_better": True, "intact": 1.0, "without": [1.5, 2.0]}
    measured = report(model=name, results={"layer_drop": drop}, layers={"layer_drop": [0.5, 1.0]})
    given = replace(scored(1.0, 2.0), model=name, settings={"score": "owl", "scores": f"{name}.json"})
    figures = [plot_report(measured), plot_report(given), plot_comparison([given] * 2, [name, "x"])]
    named = [text.get_text() for figure in figures for text in figure.findobj(Text) if "b" in text.get_text()]
    assert sum(r"a\$b\$c" in text.lower() for text in named) >= 6
    assert not [text for text in named if is_math_text(text)]


def test_names_that_the_font_lacks_give_no_warning_and_control_characters_are_visible(tmp_path):
    names = ["a\x1b[31mb", "\u202egnp", "模型", "\N{GRINNING FACE}", "مرحبا", "two\nlines"]
    joined = " ".join(names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_report(report(model=joined), tmp_path)
        figure._repr_png_()
        plot_comparison([report(model=name) for name in names], names, tmp_path)
    assert figure.get_suptitle().startswith(terminal_text(joined))


def test_scores_of_experts_are_a_heat_map(tmp_path):
    """Rows are layers, with the place where a layer has two sets of experts; grey without a token."""
    found = {
        "method": "router_weight",
        "values": {"l.0.mlp": [0.5, 0.0, 0.2], "l.0.attn.experts": [0.3, 0.4]},
        "layers": {"l.0.mlp": 0, "l.0.attn.experts": 0},
        "tokens": {"l.0.mlp": [2, 0, 1], "l.0.attn.experts": [1, 2]},
    }
    results = {"score_settings": {}, "expert_scores": found}
    made = replace(scored(0.1, 0.2), results=results)
    axes = plot_report(made, tmp_path).axes[1]
    shown = axes.images[0].get_array()
    assert shown.mask.tolist() == [[False, True, False], [False, False, True]] and shown[1, 1] == 0.4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 mlp", "0 attn"]
    assert axes.get_title() == "Score of each expert: router weight" and "grey: no token" in axes.get_xlabel()
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png", "score.png", "expert_scores.png"}
