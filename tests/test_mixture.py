"""Claims about the trained mixture of experts of the repository, on the embedded held-out text."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from hf_cod import drop_experts, perplexity, plan_experts, score_experts
from hf_cod.io.models import EMBEDDED, embedded_model, load_model
from hf_cod.io.packing import pack
from hf_cod.io.text import embedded_text
from tests.real_models import MIXTURE

ROOT = EMBEDDED.parents[2]


@pytest.fixture(scope="module")
def model(mixture):
    return load_model(mixture)[0].float()


@pytest.fixture(scope="module")
def batches(mixture):
    """Batch of a text."""
    tokenizer = load_model(mixture)[1]
    return lambda text, most=24: [{"input_ids": pack(tokenizer, [text], 256)[:most].long()}]


@pytest.fixture(scope="module")
def held_out(batches):
    """Every other window to choose on, the others to report on."""
    (batch,) = batches((EMBEDDED / "held_out.txt").read_text(encoding="utf-8"), 96)
    return [[{"input_ids": batch["input_ids"][start::4]}] for start in (0, 2)]


def test_it_is_small_and_stock_and_has_the_tokenizer_of_the_pair(mixture):
    assert sum(path.stat().st_size for path in MIXTURE.iterdir()) < 8e6
    assert type(AutoModelForCausalLM.from_pretrained(mixture)) is Qwen3MoeForCausalLM
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MIXTURE / name).read_bytes() == (Path(embedded_model("pre")) / name).read_bytes()


def test_it_has_learned(model, held_out):
    """A model that learned nothing has a perplexity of 4,096, a unigram model of 846."""
    assert perplexity(model, held_out[1]) < 65


def test_experts_are_all_used_and_specialise(model, batches):
    """On the manuals of Python, some process twice as many tokens as on a novel, or half."""
    novel, manual = (
        score_experts(model, method="frequency", batches=batches(text)).values
        for text in (embedded_text(), "\n".join(topics.values()))
    )
    for shares in (*novel.values(), *manual.values()):
        assert sum(shares) == pytest.approx(2) and min(shares) > 0.05 and max(shares) < 0.6
    ratios = [b / a for name, shares in novel.items() for a, b in zip(shares, manual[name], strict=True)]
    assert max(ratios) > 2 and min(ratios) < 0.5


def test_experts_of_low_scores_cost_less_than_random_ones(model, held_out):
    """And these less than those of high scores; experts that are merged cost more than removed ones."""
    low, generator = score_experts(model, method="router_weight", batches=held_out[0]), torch.Generator().manual_seed(0)
    drawn = {name: torch.rand(len(each), generator=generator).tolist() for name, each in low.values.items()}
    high = {name: [-value for value in each] for name, each in low.values.items()}

    def without(scores, **options):
        smaller = copy.deepcopy(model)
        drop_experts(smaller, plan_experts(model, 0.5, scores), **options)
        return perplexity(smaller, held_out[1])

    found = [without(scores) for scores in (low, replace(low, values=drawn), replace(low, values=high))]
    assert perplexity(model, held_out[1]) < found[0] < found[1] < found[2]
    assert found[0] < 0.5 * without(low, merge=True)


def test_the_page_and_the_card_say_what_it_is(model):
    """Sizes as in the config, perplexities of the card as on the page."""
    config, experts = model.config, sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    page = (ROOT / "docs/benchmarks/pretraining.md").read_text(encoding="utf-8").split("## A mixture of experts")[1]
    page, card = " ".join(page.split()), (ROOT / "model_cards/hf-cod-tiny-mixture/README.md").read_text("utf-8")
    assert (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads with "
        f"{config.num_key_value_heads} head of keys and values, {config.num_experts} experts of width "
        f"{config.moe_intermediate_size} in each layer, {config.num_experts_per_tok} of them for each token"
    ) in page
    assert f"{model.num_parameters() / 1e6:.1f}M parameters" in page
    share = f"{experts / model.num_parameters():.0%}"
    assert f"{share} of".replace("%", " %") in page and f"hold {share}" in card
    (told,) = re.findall(r"embedded pair: (\S+); .*? tokens: (\S+); a unigram model: (\S+)\. ", card)
    assert all(f"| {figure} |" in page for figure in told)
