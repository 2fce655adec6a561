import math

import pytest

from hf_cod.reporting.comparison import compare
from tests.reporting.reports import report


def test_pictures_are_written(tmp_path):
    report().plot(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{n}.png" for n in ("overview", "angular_distance", "layer_drop", "gradient_norm", "variance")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_near_is_yellow_and_empty_cells_are_blank():
    figure = report().plot()
    image = figure.axes[0].images[0]
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert red > 0.9 and green > 0.8 and blue < 0.3, "distance 0 is yellow"
    # imshow takes rows: row n - 1, column l.
    assert image.get_array().tolist() == [[0.4, 0.1], [0.5, None]]
    assert list(image.get_extent()) == [-0.5, 1.5, 0.5, 2.5]


def test_a_report_of_other_measures_is_told():
    with pytest.raises(ValueError, match="expected measures to plot, got none"):
        report(layers={}, results={}).plot()


def test_block_influence_alone_has_a_picture(tmp_path):
    report(layers={"block_influence": [0.1, 0.2]}, results={}).plot(tmp_path)
    assert (tmp_path / "block_influence.png").is_file()


def test_a_notebook_shows_the_figure():
    assert report().plot()._repr_png_().startswith(b"\x89PNG")


def scored(values, method="owl", found=None, **settings):
    settings = {"method": method, "threshold": 5.0, **settings}
    return report(kind="score", settings=settings, layers={"score": values}, results={"score_settings": found or {}})


def pruned(values, mean):
    return report(kind="prune", settings={"method": "wanda"}, layers={"sparsity": values}, results={"sparsity": mean})


def colours(axes):
    return [bar.get_facecolor() for bar in axes.patches]


def test_layers_that_are_marked_are_named_below():
    axes = scored([0.5, 0.1, 0.4, 0.2, 0.3]).plot().axes[0]
    assert axes.get_xlabel() == "layer (dark, the largest: 0, 2, 4)"
    dark, pale = colours(axes)[0], colours(axes)[1]
    assert colours(axes) == [dark, pale, dark, pale, dark] and dark != pale
    equal = pruned([0.7] * 5, 0.7).plot().axes[0]
    assert len(set(colours(equal))) == 1 and equal.get_xlabel() == "layer"
    assert not [text for text in axes.texts if text.get_text()], "no numbers over bars, which would read as values"


def test_layers_are_whole_numbers():
    results = {"angular_distance": [[0.1, 0.2, 0.3], [0.1, 0.2, None], [0.1, None, None]]}
    few = report(layers={"gradient_norm": [1.0, 2.0, 3.0], "angular_distance": [0.1] * 3}, results=results)
    angles, bars = few.plot().axes[:2]
    for axis in (angles.xaxis, angles.yaxis, bars.xaxis):
        assert all(tick == int(tick) for tick in axis.get_ticklocs())


def test_what_a_score_is_and_what_auto_chose():
    axes = scored([0.1, -0.2], "auto", {"chosen": "sensitivity", "spread": 0.25}).plot().axes[0]
    assert axes.get_title() == "Score of each layer: auto, which chose sensitivity (λ = 0.25)"
    assert axes.get_ylabel() == "increase of the loss, nats per token"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 0]], "where negative scores begin"
    given = scored([1.0, 2.0], scores="somewhere/scores.json").plot().axes[0]
    assert given.get_title() == "Score of each layer: scores.json" and given.get_ylabel() == "score"
    assert scored([1.0, 2.0]).plot().axes[0].get_ylabel() == "share of outliers D$^l$"


def test_sparsity_says_what_the_dashed_line_is_and_that_nothing_is_zero():
    axes = pruned([0.6, 0.8], 0.71).plot().axes[0]
    assert axes.get_title() == "Sparsity of each layer by wanda (dashed: 71.0% of all weights)"
    axes = pruned([0.0, 0.0], 0.0).plot().axes[0]
    assert [text.get_text() for text in axes.texts] == ["0 in every layer"] and axes.get_ylim() == (0, 1)
    packed = report(kind="pack", settings={"min_sparsity": 0.5}, layers={"sparsity": [0.6, 0.8]}, results={})
    assert packed.plot().axes[0].get_title() == "Sparsity of each layer"


def test_one_measure_is_one_picture(tmp_path):
    scored([1.0, 2.0]).plot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["score.png"]


@pytest.mark.parametrize(("plot_format", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_other_formats(plot_format, begins, tmp_path):
    found = report(layers={"variance": [1.0, 2.0]}, results={})
    found.plot(tmp_path, plot_format)
    compare([found, found]).plot(tmp_path, plot_format)
    assert {path.name for path in tmp_path.iterdir()} == {f"variance.{plot_format}", f"compare.{plot_format}"}
    assert all(path.read_bytes().startswith(begins) for path in tmp_path.iterdir())
    assert f"(variance.{plot_format})" in found.to_markdown(tmp_path)
    with pytest.raises(ValueError, match="plot_format: expected one of png, pdf, svg, got 'gif'"):
        found.plot(tmp_path, "gif")


def test_compared_runs_share_a_scale():
    left, right = compare([report(layers={"variance": [1.0, high]}, results={}) for high in (113.0, 16.0)]).plot().axes
    assert left.get_ylim() == right.get_ylim() and left.get_yscale() == right.get_yscale() == "log"
    drop = report().results["layer_drop"]
    other = {"metric": "accuracy", "lower_is_better": False, "intact": 0.5, "without": [0.1, 0.2]}
    runs = [report(layers={"layer_drop": [1.0, 2.0]}, results={"layer_drop": found}) for found in (drop, other)]
    left, right = compare(runs).plot().axes
    assert left.get_ylim()[1] > 15 and right.get_ylim()[1] < 1, "perplexity and accuracy are different quantities"


def test_intervals_are_drawn_and_explained():
    ends = [[0.1, 0.3], [0.2, math.inf]]
    found = report(layers={"block_influence": [0.2, 0.4]}, results={"intervals": {"block_influence": ends}})
    axes = found.plot().axes[0]
    assert axes.collections[0].get_segments()[0].tolist() == [[0, 0.1], [0, 0.3]]
    assert "95 % intervals" in axes.get_xlabel()


def test_layers_that_are_alike_are_not_marked():
    alike = scored([0.5000, 0.5010, 0.5020, 0.5030, 0.5040]).plot().axes[0]
    assert len(set(colours(alike))) == 1 and alike.get_xlabel() == "layer"


def test_the_trade_off_marks_the_plan_that_was_chosen():
    tried = [{"steps": {"bits": level}, "loss": level, "left": level / 10} for level in (3.0, 4.0)]
    tried.append({"steps": {"bits": 4.0, "rank": 0.1}, "loss": 2.5, "left": 0.3})
    plan = {"steps": tried[2]["steps"], "tried": tried, "curve": [[0.3, 2.0, {}], [0.9, 1.0, {}]], "intact_loss": 0.5}
    axes = report(kind="fit", layers={}, results={"plan": plan}).plot().axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["lowest expected loss, not measured", "chosen plan", "one method, measured", "intact model"]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([0.3], [2.5])


def fitted(*rows):
    tried = [{"steps": dict.fromkeys(names.split(), 0.5), "left": left, "loss": loss} for names, left, loss in rows]
    plan = {"steps": tried[0]["steps"], "tried": tried, "curve": [[0.3, 2.0, {}], [0.9, 1.0, {}]], "intact_loss": 0.5}
    return report(kind="fit", layers={}, results={"plan": plan}).plot()


def test_names_in_the_trade_off_do_not_overlap():
    figure = fitted(*((f"width rank{i}", 0.6, 1.5 + i / 1000) for i in range(6)), ("bits", 0.3, 1.9))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    named = [text.get_text() for text in figure.axes[0].texts]
    assert named[0] == "width + rank0" and "bits" in named and 3 <= len(named) < 7
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize("left, listed", [(0.6, False), (0.4, True)])
def test_a_mark_under_the_star_is_not_in_the_legend(left, listed):
    figure = fitted(("rank", 0.6, 1.5), ("rank width", left, 1.5), ("bits", 0.3, 1.9))
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ("several methods, measured" in legend) == listed and {"chosen plan", "one method, measured"} < {*legend}


@pytest.mark.parametrize("steps, ends", [([1, 40], (1, 40)), ([1, 10, 40], (1, 40)), ([5], (4.5, 5.5))])
def test_panels_of_a_history_span_the_measured_steps(steps, ends):
    rows = [[0.5, 0.25]] * len(steps)
    history = {"step": steps, "angular_distance": rows, "variance": [[], *rows[1:]] if steps[1:] else rows}
    history |= {"gradient_norm": rows, "effective_depth": [1.5] * len(steps)}
    figure = report(layers={"gradient_norm": rows[0]}, results={"history": history}).plot()
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "step"]
    assert len(panels) == 4 and {axes.get_xlim() for axes in panels} == {ends}
    (angles,) = [axes for axes in panels if axes.get_title().startswith("Angular")]
    across = angles.collections[0].get_coordinates()[0, :, 0]
    assert (across[0], across[-1]) == ends and len(across) == len(steps) + 1
