"""Claims about real models on real text: nothing here is tiny or random."""

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_cod import LayerStatistics, collect_statistics, compare, diagnose, drop, perplexity, prune, score_layers, skip
from hf_cod.functional.depth import spearman
from hf_cod.io.text import SampleSettings, split_samples, token_batches
from tests import references

# Perplexity of SmolLM2-135M without layer 0, 1, ..., 29 on Brown text, measured independently (dense: 56.8).
INDEPENDENT = [
    74212, 1046, 153, 71, 67, 66, 77, 68, 122, 73, 75, 286, 65, 67, 62, 68, 63, 61, 64, 67, 68, 74, 71, 76, 105, 70, 69,
    78, 199, 450,
]  # fmt: skip
SAMPLES = {"max_samples": 4, "sequence_length": 256}


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def pre_ln(model, tokenizer, brown_text):
    return diagnose(model, tokenizer, brown_text, name="SmolLM2-135M", show_progress=False, **SAMPLES)


@pytest.fixture(scope="module")
def post_ln(mpnet, brown_text):
    encoder = AutoModel.from_pretrained(mpnet, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(mpnet)
    options = {"max_samples": 4, "sequence_length": 128, "token": "all"}
    return diagnose(encoder, tokenizer, brown_text, name="MPNet", show_progress=False, **options)


def test_layer_drops_rank_as_measured_independently(pre_ln):
    without = torch.tensor(pre_ln.results["layer_drop"]["without"])
    assert spearman(torch.tensor(INDEPENDENT), without) >= 0.9


def test_the_first_layers_matter_most_and_the_middle_least(pre_ln):
    drops = pre_ln.layers["layer_drop"]
    order = sorted(range(30), key=lambda i: -drops[i])
    assert order[:2] == [0, 1] and drops[0] > 20 * drops[1] > 20 * drops[order[2]]
    assert all(10 <= i <= 20 for i in order[-3:])
    assert sum(pre_ln.layers["gradient_norm"][:15]) > sum(pre_ln.layers["gradient_norm"][15:])
    assert pre_ln.layers["variance"][11] > 50 * pre_ln.layers["variance"][10], "massive activations arise in layer 11"
    depth = pre_ln.results["effective_depth"]
    assert depth["low"] is None and 1 < depth["value"] < 25, "four samples give no interval"


def test_post_ln_shows_the_opposite_trend(model, tokenizer, brown_text, pre_ln, post_ln, tmp_path):
    """Post-LN: late layers turn the hidden state more and their removal costs most; Pre-LN: the early ones."""
    angles = diagnose(
        model, tokenizer, brown_text, token="all", metrics=["angular_distance"], show_progress=False, **SAMPLES
    )
    assert angles.results["late_share"] < 0.5 < post_ln.results["late_share"]
    post, pre = post_ln.layers["layer_drop"], pre_ln.layers["layer_drop"]
    assert max(post) == post[-1] and max(pre) == pre[0]
    compare([post_ln, pre_ln]).plot(tmp_path)
    assert imread(tmp_path / "compare.png").std() > 0.05, "something is drawn"


def test_without_a_layer_the_text_is_as_likely_as_after_dropping_it(model, tokenizer, brown_text, pre_ln, tmp_path):
    batches = token_batches(tokenizer, brown_text, SampleSettings(**SAMPLES))
    with skip(model, 17):
        expected = perplexity(model, batches)
    assert expected == pytest.approx(pre_ln.results["layer_drop"]["without"][17], rel=1e-5)
    shorter = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32)
    drop(shorter, 17)
    shorter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert perplexity(again, batches) == pytest.approx(expected, rel=1e-6)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    cached = again.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, again.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_pruning_with_the_inputs_in_view_keeps_more(method, smollm2, tokenizer, model, brown_text, tmp_path):
    """Half of the weights: magnitude ruins the model, Wanda and SparseGPT do not; a reload computes the same."""
    drawn = token_batches(tokenizer, brown_text, SampleSettings(max_samples=16, sequence_length=128))
    calibration, unseen = split_samples(drawn, 8)
    found = {"intact": perplexity(model, unseen)}
    for name in ("magnitude", method):
        pruned = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
        report = prune(pruned, 0.5, name, batches=calibration)
        assert report.results["sparsity"] == pytest.approx(0.5, abs=1e-4)
        found[name] = perplexity(pruned, unseen)
    assert found["intact"] < found[method] < 0.5 * found["magnitude"]
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert perplexity(again, unseen) == pytest.approx(found[method], rel=1e-6)


def test_vision_model_on_a_photograph(dinov2, photograph):
    report = diagnose(dinov2, batches=[{"pixel_values": photograph}], token="all", name="DINOv2", show_progress=False)
    assert len(report.results["angular_distance"]) == 12
    assert report.results["layer_drop"]["metric"] == "output_angle"
    assert all(0 < value < 1 for value in report.results["layer_drop"]["without"])
    assert report.results["layer_drop"]["intact"] == pytest.approx(0, abs=1e-7)


def test_owl_ratios_follow_the_papers_definition(model, tokenizer, brown_text):
    """D^l = share of ||X_j||_2 |W_ij| above M times the layer's mean, for early, middle and late layers."""
    ids = tokenizer(brown_text[:4000], return_tensors="pt")["input_ids"][:, :256].view(2, 128)
    batches = [{"input_ids": ids}]
    statistics = collect_statistics(model, batches)
    for index in (0, 11, 29):
        A = torch.cat(
            [
                (W.double().abs() * X.double().norm(dim=0)).flatten()
                for W, X in references.linear_inputs(model, batches, index).values()
            ]
        )
        for M in (3, 5, 7, 10):
            found = score_layers(model, statistics, threshold=float(M)).values[index]
            assert found == pytest.approx(float((M * A.mean() < A).double().mean()), abs=1e-6) and found > 0


def test_owl_of_an_importance_matrix_equals_that_of_statistics(model, tokenizer, brown_text, tmp_path):
    statistics = collect_statistics(model, tokenizer=tokenizer, texts=brown_text, max_samples=1)
    statistics.save(tmp_path / "imatrix.gguf", model=model)
    read = LayerStatistics.load(tmp_path / "imatrix.gguf", model=model)
    found, expected = (score_layers(model, each, "owl").values for each in (read, statistics))
    assert found == pytest.approx(expected, rel=1e-4), "sums in float32"
