"""The page in a real browser: mouse, keyboard, slider, dark and narrow; without errors and requests."""

import math
from itertools import pairwise

import pytest

from hf_cod import LayerScores, allocate, compare
from tests.browser import Browser, needs_chromium
from tests.reporting.html.runs import HOSTILE, diagnosed

pytestmark = [needs_chromium, pytest.mark.process]
FIRST, SECOND = diagnosed(12, "first"), diagnosed(30, "second")
BARS = "document.querySelectorAll('#bars svg')"
MATRIX = "document.querySelector('#matrices svg')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page in a wide light window; at the end nothing was logged, and nothing was loaded but the page."""

    def opened(page: str) -> Browser:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        browser.resize(1200, 900)
        browser.darken(False)
        browser.errors.clear()
        browser.requests.clear()
        browser.open(file)
        return browser

    yield opened
    assert browser.errors == [] and [url.rpartition("/")[2] for url in browser.requests] == ["page.html"]


def choose(browser, name, value):
    """Chooses an option, or moves a slider."""
    set_it = f"const it = find('{name}'); it.value = '{value}'; it.dispatchEvent(new Event('input'));"
    browser.value(f"(() => {{ {set_it} it.dispatchEvent(new Event('change')); }})()")


def text(browser, place):
    return browser.value(f"document.querySelector('{place}').textContent")


def middle(browser, element):
    box = browser.value(
        f"(() => {{ const it = {element}; it.scrollIntoView({{block: 'center'}}); "
        "const box = it.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
    )
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def test_bars_are_switched_by_measure(show):
    browser = show(FIRST.to_html())
    assert browser.value("[...find('measure').options].map((each) => each.value)") == list(FIRST.layers)
    for measure, values in FIRST.layers.items():
        choose(browser, "measure", measure)
        known = [value for value in values if value is not None]
        assert browser.value(f"{BARS}[0].querySelectorAll('.bar').length") == len(known), measure
    choose(browser, "measure", "variance")  # on a logarithmic scale, equal steps
    heights = browser.value(
        f"[...{BARS}[0].querySelectorAll('.bar')].map((each) => Number(each.getAttribute('height')))"
    )
    steps = [after - before for before, after in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 11) and steps[0] > 0


def test_pointing_at_a_bar_selects_its_layer_in_both_runs_by_relative_depth(show):
    browser = show(compare([FIRST, SECOND]).to_html())
    browser.point(*middle(browser, f"{BARS}[0].querySelectorAll('.bar')[7]"))
    told = browser.value("[...document.querySelectorAll('#bars .readout')].map((each) => each.textContent)")
    assert told[0].startswith("layer 7: angular distance 0.") and "95 %" in told[0]
    assert told[1].startswith("layer 18: "), "(7 + 1/2) / 12 of 30 layers"


def test_cells_of_the_matrix_are_told_by_mouse_and_keyboard(show):
    browser = show(FIRST.to_html())
    angles = FIRST.results["angular_distance"]
    assert browser.value(f"{MATRIX}.querySelectorAll('.cell').length") == 12 * 13 // 2 + 40, "and the colours"
    browser.point(*middle(browser, f"{MATRIX}.querySelectorAll('.cell')[14]"))  # 12 of layer 0, the third of layer 1
    assert text(browser, "#matrices .readout") == f"layer 1 to layer 4 (n = 3): {angles[1][2]:.4g}"
    browser.value(f"{MATRIX}.focus()")
    browser.press("ArrowRight", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowLeft")
    assert text(browser, "#matrices .readout") == f"layer 1 to layer 3 (n = 2): {angles[1][1]:.4g}"
    browser.press(*["ArrowRight"] * 20)
    assert text(browser, "#matrices .readout").startswith("layer 11 to the output (n = 1): ")


def test_everything_is_reached_by_the_keyboard(show):
    browser = show(FIRST.to_html())
    seen = []
    for _ in range(10):
        browser.press("Tab")
        told = "(({id, tagName, role}) => id || role || tagName)(document.activeElement)"
        seen.append(browser.value(told))
        ring = browser.value("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", seen
    expected = ["A", "measure", "slider", "application", "kind", "importance", "amount", "slider", "SUMMARY", "SUMMARY"]
    assert seen == expected
    browser.value(f"{BARS}[0].focus()")
    browser.press("Home", "ArrowRight", "ArrowRight", "ArrowLeft")
    state = browser.value(
        f"['aria-valuenow', 'aria-valuetext', 'aria-label'].map((each) => {BARS}[0].getAttribute(each))"
    )
    assert state[0] == "1" and state[1].startswith("layer 1: angular distance ")
    assert state[2] == "first: angular distance, by layer"
    browser.press("End", "ArrowRight")
    assert browser.value(f"{BARS}[0].getAttribute('aria-valuenow')") == "11"


def test_the_slider_distributes_as_python_does(show):
    browser = show(compare([FIRST, SECOND]).to_html())
    choose(browser, "kind", "sparsity")
    browser.value("find('amount').focus()")
    browser.press(*["ArrowRight"] * 16)
    assert text(browser, "#amount-value") == "0.66"
    for number, run in enumerate((FIRST, SECOND)):
        weights = run.results["layer_parameters"]
        scores = LayerScores("", "angular", run.layers["angular_distance"], weights)
        for kind, budget, plan in (
            ("sparsity", 0.66, allocate(scores, "sparsity", 0.66)),
            ("bits", 3.3, allocate(scores, "bits", 3.3)),
        ):
            choose(browser, "kind", kind)
            choose(browser, "amount", budget)
            assert browser.value(f"planOf(RUNS[{number}]).values") == pytest.approx(plan.values, abs=1e-6)
            told = browser.value(f"document.querySelectorAll('#plans .result')[{number}].textContent")
            assert told.startswith(f"Mean {kind}: {plan.mean:.4f}. Size of the layers: ")
            if kind == "sparsity":  # bfloat16
                assert (
                    f"{2 * sum(weights) * (1 - 0.66) / 1e6:.2f} MB of {2 * sum(weights) / 1e6:.2f} MB (34.0 %)" in told
                )


def test_removed_layers_and_the_expected_perplexity(show):
    browser = show(FIRST.to_html())
    choose(browser, "importance", "layer_drop")
    choose(browser, "amount", 3)
    cost = FIRST.layers["layer_drop"]
    removed = sorted(sorted(range(12), key=lambda layer: cost[layer])[:3])
    without = FIRST.results["layer_drop"]["without"]
    expected = 20 * math.prod(without[layer] / 20 for layer in removed)
    told = text(browser, "#plans .result")
    assert told.startswith(f"Removed: {', '.join(map(str, removed))}. Size of the layers: ")
    assert f"Expected perplexity: {expected:.4g} (intact: 20)." in told
    assert browser.value("document.querySelectorAll('#plans .bar.marked').length") == 3


def test_what_a_report_lacks_is_left_out(show):
    bare = diagnosed(4, HOSTILE, layers={"variance": [1.0, 2.0, 3.0, 4.0]}, results={}, environment={})
    browser = show(bare.to_html())
    assert browser.value("[find('angles').hidden, find('budget').hidden]") == [True, True]
    assert browser.value("document.title").startswith("diagnose: </script>") and text(browser, "h3") == HOSTILE
    browser = show(diagnosed(2, layers={"score": [2.0, 2.0]}, results={}).to_html())
    choose(browser, "kind", "sparsity")
    assert "Size of the layers: 50.0 %." in text(browser, "#plans .result"), "without sizes, all layers count alike"


def test_dark_narrow_and_deep(show):
    browser = show(compare([diagnosed(80, "a"), diagnosed(80, "b")]).to_html())
    duration = browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert duration < 2000, f"opened in {duration} ms"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.value(ground)
    browser.darken(True)
    assert light == "rgb(255, 255, 255)" and browser.value(ground) == "rgb(20, 24, 29)"
    browser.resize(360, 740, mobile=True)
    assert browser.value("document.documentElement.scrollWidth") <= 360
    choose(browser, "measure", "variance")  # up to 2 ** 79
    ends = "[...document.querySelectorAll('#bars text')].map((each) => each.getBBox().x)"
    assert min(browser.value(ends)) >= 0, "numbers are cut off"
    assert browser.value(f"{BARS}[0].getBoundingClientRect().right") <= 360
