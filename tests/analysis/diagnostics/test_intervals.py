import pytest
import torch

from hf_cod import diagnose, token_batches
from hf_cod.analysis.diagnostics.intervals import LEAST_SAMPLES, ends_of
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like


@pytest.mark.parametrize("metric", ["perplexity", "accuracy", "output_angle"])
def test_intervals_are_those_of_a_bootstrap_over_samples(metric):
    model, texts = build("llama"), "one two three four five " * 20
    options = {"drop_metric": metric, "metrics": ["angular_distance", "block_influence", "layer_drop"]}
    batches = token_batches(gpt_like(), texts, sequence_length=8, max_samples=10, batch_size=1)
    report = diagnose(model, batches=batches, show_progress=False, **options)
    each = [diagnose(model, batches=[batch], show_progress=False, **options) for batch in batches]
    draws = torch.randint(10, (1000, 10), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for measure in ("angular_distance", "block_influence"):
        samples = torch.tensor([single.layers[measure] for single in each], dtype=torch.float64)  # (S, L)
        naive = samples[draws].mean(1).quantile(ends, dim=0).T
        assert torch.allclose(torch.tensor(report.results["intervals"][measure]).double(), naive, atol=1e-6)
    # Samples of equal length: perplexity of a draw is the geometric mean, that of the other metrics the arithmetic one.
    without = torch.tensor([single.results["layer_drop"]["without"] for single in each], dtype=torch.float64)
    drawn = without.log()[draws].mean(1).exp() if metric == "perplexity" else without[draws].mean(1)
    naive = drawn.quantile(ends, dim=0).T
    assert torch.allclose(torch.tensor(report.results["intervals"]["layer_drop"]).double(), naive, rtol=1e-4)


def test_few_samples_have_no_interval():
    assert ends_of(torch.rand(LEAST_SAMPLES - 1, 3), seed=0) is None
    assert len(ends_of(torch.rand(LEAST_SAMPLES, 3), seed=0)) == 3
