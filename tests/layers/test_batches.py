"""Functions that run a model take batches, or a tokenizer and texts, with the same results and the same errors."""

import copy
import inspect
import tempfile
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import torch

import hf_cod
from hf_cod import LayerStatistics, RunReport, SampleSettings, collect_statistics, perplexity, token_batches
from hf_cod.io.masking import mask_tokens
from tests.tiny_models import build
from tests.tiny_tokenizers import bert_like, gpt_like

TEXTS = ["one two three four five six seven eight nine ten a three one four one five " * 6, "nine two six five " * 20]
SAMPLES = {"sequence_length": 12, "max_samples": 6, "batch_size": 2, "seed": 3}
MULTIPLE = {"hidden_size": 64, "intermediate_size": 128}
# Function -> what it is called with beside batches or texts, and the name of the argument for batches.
CALLS = {
    "apply_steps": lambda model: (model, {"sparsity": 0.5}),
    "collect_statistics": lambda model: (model,),
    "diagnose": lambda model: (model,),
    "drop_experts": lambda model: (model, 0.5),
    "drop_layers": lambda model: (model, [1], "linear"),
    "export": lambda model: (model, tempfile.mkdtemp()),
    "factorize": lambda model: (model, 0.7),
    "measure_swap": lambda model: (model, tuned(model)),
    "narrow": lambda model: (model, 0.8, "fluctuation"),
    "perplexity": lambda model: (model,),
    "plan_depth": lambda model: (model, 1, "search"),
    "plan_experts": lambda model: (model, 0.5),
    "plan_ranks": lambda model: (model, 0.7, "fisher"),
    "plan_repeat": lambda model: (model, 1),
    "prune": lambda model: (model, 0.5),
    "quantize": lambda model: (model,),
    "recover": lambda model: (model,),
    "score_experts": lambda model: (model, None, "reap"),
    "score_layers": lambda model: (model, None, "gradient_norm"),
    "search_plan": lambda model: (model, "sparsity", 0.5),
}
OPTIONS = {
    "diagnose": {"show_progress": False, "metrics": ["angular_distance", "gradient_norm"]},
    "export": {"to": "auto-round", "bits": 3.6},
    "narrow": {"channel_multiple": 8},
    "quantize": {"bits": 3.5},
    "recover": {"steps": 3},
    "search_plan": {"passes": 60},
}
# These work without batches by default.
OPTIONAL = {"export", "quantize"}
# These have a seed of their own, also for batches; the keyword sets both.
SEEDED = {"recover", "search_plan"}


def tuned(model):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    return other


def model_for(function):
    """With rows of whole blocks, so that three and four bits save something."""
    family = "mixtral" if "experts" in function else "llama"
    return build(family, 3, max_position_embeddings=512, **MULTIPLE)


def call(function, model, **given):
    """The result, and the weights afterwards."""
    found = getattr(hf_cod, function)(*CALLS[function](model), **OPTIONS.get(function, {}), **given)
    return comparable(found), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def comparable(found):
    if isinstance(found, LayerStatistics):
        return found.digests(), {name: tokens.tolist() for name, tokens in found.tokens.items()}
    if isinstance(found, RunReport):
        told = {name: value for name, value in found.settings.items() if name not in SAMPLES and name != "pack"}
        return told, found.layers, {k: v for k, v in found.results.items() if k != "seconds"}
    return asdict(found) if is_dataclass(found) else found


def assert_same(first, second):
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


def test_the_table_has_all_functions_that_take_batches():
    """`plan_fit` and `heal` have tests of their own, as they take two kinds of samples and windows."""
    taking = {
        name
        for name in hf_cod.__all__
        if "texts" in inspect.signature(getattr(hf_cod, name)).parameters and name != "token_batches"
    }
    assert taking - {"plan_fit", "heal"} == CALLS.keys()


@pytest.mark.parametrize("function", CALLS)
def test_texts_give_the_results_of_batches_made_by_hand(function):
    model, seed = model_for(function), {"seed": 3} if function in SEEDED else {}
    by_hand = call(function, copy.deepcopy(model), batches=token_batches(gpt_like(), TEXTS, **SAMPLES), **seed)
    assert_same(call(function, copy.deepcopy(model), tokenizer=gpt_like(), texts=TEXTS, **SAMPLES), by_hand)
    if function == "diagnose":  # its settings are also those of the samples
        return
    samples = SampleSettings(sequence_length=12, max_samples=99, batch_size=2, seed=3)
    given = {"tokenizer": gpt_like(), "texts": list(TEXTS), "samples": samples, "max_samples": 6, **seed}
    assert_same(call(function, copy.deepcopy(model), **given), by_hand)


@pytest.mark.parametrize("function", sorted(CALLS.keys() - {"recover"}))
def test_padded_texts_are_masked_as_by_hand(function):
    """One sample a text, of different lengths; one string is one text."""
    tokenizer, model = gpt_like(), model_for(function)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [" ".join(["one two three"] * count) for count in (1, 2, 3, 4, 9, 7)]
    cut = {"pack": False, "sequence_length": 20, "batch_size": 3}
    batches = token_batches(tokenizer, texts, **cut)
    assert any(not batch["attention_mask"].all() for batch in batches)
    by_hand = call(function, copy.deepcopy(model), batches=batches)
    assert_same(call(function, copy.deepcopy(model), tokenizer=tokenizer, texts=texts, **cut), by_hand)


def test_one_string_and_a_stream_are_texts():
    model, (first, second) = model_for("perplexity"), TEXTS
    batches = token_batches(gpt_like(), first, **SAMPLES)
    assert perplexity(model, tokenizer=gpt_like(), texts=first, **SAMPLES) == perplexity(model, batches)
    stream = token_batches(gpt_like(), iter([first, second]), **SAMPLES)
    found = perplexity(model, tokenizer=gpt_like(), texts=iter([first, second]), **SAMPLES)
    assert found == perplexity(model, stream)
    with pytest.raises(ValueError, match="texts: expected strings, got PosixPath; read the file and pass its text"):
        perplexity(model, tokenizer=gpt_like(), texts=Path("novel.txt"))


def test_masked_language_models_get_labels_as_in_the_commands():
    model, tokenizer = build("bert"), bert_like()
    batches = mask_tokens(tokenizer, token_batches(tokenizer, TEXTS, **SAMPLES), SAMPLES["seed"])
    texts = {"tokenizer": tokenizer, "texts": TEXTS, **SAMPLES}
    assert perplexity(model, **texts) == perplexity(model, batches)
    statistics = collect_statistics(model, **texts)
    assert statistics.digests() == collect_statistics(model, batches).digests()
    assert collect_statistics(torch.compile(model), **texts).digests() == statistics.digests()
    with pytest.raises(ValueError, match="tokenizer: expected a mask token for a masked language model, got none"):
        perplexity(model, tokenizer=gpt_like(), texts=TEXTS, **SAMPLES)


def test_samples_fit_the_positions_of_the_model():
    with pytest.raises(ValueError, match=r"sequence_length: expected at most 64 tokens, .* transformer\.wpe, got 65"):
        collect_statistics(build("gpt2"), tokenizer=gpt_like(), texts=TEXTS, sequence_length=65)


def test_settings_of_samples_are_checked():
    texts = {"tokenizer": gpt_like(), "texts": TEXTS}
    for given, message in [
        ({"sequence_length": 1}, "sequence_length: expected at least 2, got 1"),
        ({"max_samples": "many"}, "max_samples: expected an integer, got 'many'"),
        ({"max_sample": 3}, r"did you mean max_samples\? .*got 'max_sample'$"),
        ({"tokenizer": "gpt2"}, "tokenizer: expected a transformers tokenizer, got 'gpt2'"),
        ({"samples": {"max_samples": 3}}, "samples: expected SampleSettings or None, got dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf_cod.prune(build("llama"), 0.5, **{**texts, **given})


@pytest.mark.parametrize("function", CALLS)
def test_batches_and_texts_exclude_each_other(function):
    model = model_for(function)
    batches = token_batches(gpt_like(), TEXTS, **SAMPLES)
    before = copy.deepcopy(model.state_dict())
    texts = {"tokenizer": gpt_like(), "texts": TEXTS, **SAMPLES}
    for given, message in [
        ({"batches": batches, **texts}, "batches: expected batches, or tokenizer and texts, got both"),
        ({"texts": TEXTS}, "tokenizer: expected the model's tokenizer with texts, got none"),
        ({"tokenizer": gpt_like()}, "texts: expected texts with the tokenizer, or batches, got neither"),
        ({**texts, "texts": "one two"}, "texts: expected at least one sample of 12 tokens, got 2 tokens in all"),
        ({**texts, "texts": [1, 2]}, "texts: expected strings, got int"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(function, model, **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("function", sorted(CALLS.keys() - OPTIONAL))
def test_one_of_them_is_required(function):
    with pytest.raises(ValueError, match=r"batches: expected batches, or tokenizer and texts,.* got neither$"):
        call(function, model_for(function))


@pytest.mark.parametrize("function", sorted(CALLS.keys() - {"diagnose"}))
def test_settings_of_samples_without_texts_are_refused(function):
    batches = token_batches(gpt_like(), TEXTS, **SAMPLES)
    for given in ({"max_samples": 4}, {"samples": SampleSettings(12)}):
        (name,) = given
        with pytest.raises(ValueError, match=f"{name}: expected tokenizer and texts, which it applies to, got batches"):
            call(function, model_for(function), batches=batches, **given)
