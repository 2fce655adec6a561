"""What a model answers without each layer, against loops over single prompts."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cod import GenerationTask, diagnose, drop, find_decoder_layers, skip
from hf_cod.analysis.diagnostics.generation_drop import measure_generation_drop, sweep_cost, verdict
from hf_cod.analysis.generation import decoding
from hf_cod.analysis.generation.prompts import tokenized
from hf_cod.analysis.generation.settings import GenerationSettings
from hf_cod.analysis.generation.sources import load_tasks
from hf_cod.io.models import embedded_model
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

PROMPTS = ["It was a", "The captain was very", "Anne", "She had been walking in the", "to be", "I have no doubt of the"]
REFERENCES = [" man", " much pleased", " was", " garden", " sure", " most"]
OPTIONS = {"max_new_tokens": 4, "batch_size": 4}


def letters(answer, reference):
    """Share of the answer's letters that the reference has, too: a score that depends on all of the answer."""
    found = [letter in reference for letter in answer]
    return sum(found) / max(1, len(found))


@pytest.fixture(scope="module")
def pair():
    place = embedded_model("pre")
    model = AutoModelForCausalLM.from_pretrained(place)
    drop(model, [*range(2, 11)])  # three layers are enough
    return model, AutoTokenizer.from_pretrained(place)


@pytest.fixture
def task():
    return GenerationTask("letters", PROMPTS, REFERENCES, letters)


def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"]


def by_hand(model, tokenizer, prompt):
    ids = torch.tensor([tokens(tokenizer, prompt)])
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return said[0, ids.shape[1] :].tolist()


@torch.no_grad()
def nats(model, asked, said):
    logs = model(torch.tensor([[*asked, *said]])).logits[0].double().log_softmax(-1)
    return -sum(float(logs[len(asked) + t - 1, token]) for t, token in enumerate(said))


def test_three_readings_against_a_loop_over_prompts_on_dropped_models(pair, task):
    model, tokenizer = pair
    found = measure_generation_drop(model, tokenizer, task, **OPTIONS)
    places = [PROMPTS.index(prompt) for prompt in shuffled(task)]
    own = [by_hand(model, tokenizer, prompt) for prompt in PROMPTS]
    for column in range(len(find_decoder_layers(model)) + 1):
        shorter = drop_copy(model, column - 1) if column else model
        for row, i in enumerate(places):
            asked = tokens(tokenizer, PROMPTS[i])
            answer = tokenizer.decode(by_hand(shorter, tokenizer, PROMPTS[i]), skip_special_tokens=True)
            assert found.scores[row, column] == pytest.approx(letters(answer, REFERENCES[i]))
            reference = [*tokens(tokenizer, PROMPTS[i] + REFERENCES[i])[len(asked) :], tokenizer.eos_token_id]
            assert found.reference[row, column] == pytest.approx(nats(shorter, asked, reference), rel=1e-4)
            assert found.chain[row, column] == pytest.approx(nats(shorter, asked, own[i]), rel=1e-4, abs=1e-4)


def shuffled(task):
    """The prompts in the order of the sweep."""
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0))
    return [task.prompts[i] for i in order]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batches_do_not_change_answers(pair, task, temperature):
    one, four = (
        measure_generation_drop(*pair, task, max_new_tokens=4, batch_size=size, temperature=temperature)
        for size in (1, 4)
    )
    assert not four.notes, "prompts of unequal length are padded"
    assert one.answers == four.answers and torch.equal(one.scores, four.scores)
    assert torch.allclose(one.chain, four.chain, rtol=1e-4)


def test_sampled_answers_depend_on_the_seed_alone(pair, task):
    def answers(seed):
        torch.rand(3)  # the global state has no effect
        return measure_generation_drop(*pair, task, temperature=1.0, seed=seed, **OPTIONS).answers

    assert answers(0) == answers(0) and sorted(answers(0)) != sorted(answers(1))


def test_an_interrupted_run_resumes_to_the_same_result(pair, task, tmp_path, monkeypatch):
    expected = measure_generation_drop(*pair, task, **OPTIONS)
    answers, count = decoding.Decoder.answers, []

    def interrupted(self, *arguments):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return answers(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Decoder, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_generation_drop(*pair, task, journal=tmp_path, **OPTIONS)
        before = len(count)
        found = measure_generation_drop(*pair, task, journal=tmp_path, **OPTIONS)
    batches = 2 * (len(find_decoder_layers(pair[0])) + 1)
    assert len(count) - before == batches - 4, "what was answered is not answered again"
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.chain, expected.chain)
    assert found.answers == expected.answers


def test_a_layer_that_clearly_matters_stops_early_and_others_do_not(pair):
    def sound(answer, reference):
        return float(answer == reference)

    model, tokenizer = pair
    # The references are the model's own answers, so the intact model is always right.
    prompts = [f"{word} was" for word in ("Anne", "Elizabeth", "He", "She", "It", "There", "Mary", "Henrietta")] * 4
    own = [tokenizer.decode(by_hand(model, tokenizer, prompt), skip_special_tokens=True) for prompt in prompts[:8]] * 4
    same = GenerationTask("own", prompts, own, sound)
    found = measure_generation_drop(model, tokenizer, same, **OPTIONS)
    asked = (~found.scores.isnan()).sum(0).tolist()
    assert asked[0] == 32 and found.scores[:, 0].mean() == 1
    told = [verdict(found.scores[:, c], found.scores[:, 0], found.looks) for c in range(1, len(asked))]
    assert told[0] == "harmful" and asked[1] < 32
    assert all((count < 32) <= (each == "harmful") for count, each in zip(asked[1:], told, strict=True))
    whole = measure_generation_drop(model, tokenizer, same, stop_early=False, **OPTIONS)
    assert not whole.scores.isnan().any()
    known = ~found.scores.isnan()
    assert torch.equal(whole.scores[known], found.scores[known])


def test_verdicts_by_the_bound():
    """|mean| > sqrt(2 ln(2 K / 0.05) / n): for K = 1 and a mean of 1, from n = 8 on."""
    zeros, ones = torch.zeros(20), torch.ones(20)
    for n in (7, 8):
        unseen = torch.cat([zeros[:n], torch.full((20 - n,), torch.nan)])
        assert verdict(unseen, ones, 1) == ("harmful" if n == 8 else "open")
    assert verdict(ones, zeros, 1) == "helpful" and verdict(ones, ones, 1) == "open"


def test_a_model_that_padding_changes_gets_prompts_of_equal_length(task):
    """RWKV and Mamba read padding as text."""
    model, tokenizer = build("gpt2").eval(), gpt_like()
    texts = ["one two three", "four", "five six", "seven eight nine ten", "a", "two one", "three"]
    few = GenerationTask("few", texts, [" one"] * 7)
    assert not measure_generation_drop(model, tokenizer, few, **OPTIONS).notes
    forward = type(model).forward

    def blind(self, *arguments, attention_mask=None, position_ids=None, **options):
        return forward(self, *arguments, **options)

    model.forward = blind.__get__(model)
    found = measure_generation_drop(model, tokenizer, few, **OPTIONS)
    assert "same length" in found.notes[0]
    alone = measure_generation_drop(model, tokenizer, few, max_new_tokens=4, batch_size=1)
    assert found.answers == alone.answers and torch.equal(found.scores, alone.scores)


def test_prompts_beyond_the_positions_are_counted():
    model = build("gpt2")
    longest = model.config.max_position_embeddings
    many = GenerationTask("many", ["one " * (longest - 2), "two three "], ["one", "two"])
    found = measure_generation_drop(model, gpt_like(), many, max_new_tokens=4)
    assert found.left_out == 1 and len(found.scores) == 1
    with pytest.raises(ValueError, match="tasks: expected prompts with answers of at most"):
        measure_generation_drop(model, gpt_like(), GenerationTask("no", ["one " * longest], ["one"]))


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="tasks: expected a causal language model, got Bert"):
        measure_generation_drop(build("bert_headless"), gpt_like(), GenerationTask("no", ["one"], ["one"]))


def test_the_model_keeps_its_modes_and_configs(pair, task):
    model, tokenizer = pair
    model.train()
    own, before = model.generation_config, json.dumps(model.config.to_dict(), default=str)
    measure_generation_drop(model, tokenizer, task, **OPTIONS)
    assert model.training and model.generation_config is own
    assert json.dumps(model.config.to_dict(), default=str) == before
    model.eval()


def test_diagnose_reports_it(pair, task, tmp_path):
    chosen = {"metrics": ["layer_drop", "generation"], "max_samples": 1, "sequence_length": 16, "show_progress": False}
    report = diagnose(*pair, "one two " * 40, tasks=task, output=tmp_path, max_new_tokens=4, batch_size=4, **chosen)
    found = measure_generation_drop(*pair, task, **OPTIONS)
    means = found.scores.mean(0)
    assert report.layers["task_accuracy"] == pytest.approx((means[1:] - means[0]).tolist())
    losses = found.reference.sum(0) / found.reference_tokens.sum()
    assert report.layers["reference_loss"] == pytest.approx((losses[1:] - losses[0]).tolist())
    again = diagnose(*pair, "one two " * 40, tasks=task, output=tmp_path, max_new_tokens=4, batch_size=4, **chosen)
    assert again.results == report.results and not (tmp_path / "earlier-1").exists()
    report.plot(tmp_path)
    assert (tmp_path / "generation.png").is_file()
    assert "task accuracy" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"metrics": ["generation"]}, "tasks: expected at least one for the measure generation"),
        ({"max_new_tokens": 3}, "max_new_tokens: expected none with measures that generate no answers"),
        ({"tasks": "nothing"}, "tasks: expected gym:NAME .* got 'nothing'"),
        ({"tasks": ["gym:chain_sum"], "metrics": ["layer_drop"]}, "tasks: expected none with metrics other than gen"),
        ({"tasks": 3}, "tasks: expected names or hf_cod.GenerationTask, got 3"),
    ],
)
def test_wrong_settings_are_one_clear_line(pair, options, told):
    with pytest.raises(ValueError, match=told) as error:
        diagnose(*pair, "one two " * 40, max_samples=1, sequence_length=16, show_progress=False, **options)
    assert "\n" not in str(error.value)


def test_the_cost_counts_all_models():
    assert "at most 13,440 tokens" in sweep_cost(20, 64, GenerationSettings(max_new_tokens=10))


@pytest.mark.real
def test_a_real_model_answers_chats_in_batches_as_alone_and_under_skip_as_dropped(smollm2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    chosen = GenerationSettings(max_prompts=4, max_new_tokens=6)
    tasks = load_tasks("gym:chain_sum,max_terms=3", tokenizer, chosen)
    prompts = tokenized(tokenizer, tasks, None, chosen.max_new_tokens)
    assert tokenizer.decode(prompts.ids[0]).endswith("<|im_start|>assistant\n")
    shorter = drop_copy(model, 12)
    for used, context in ((model, nullcontext()), (shorter, skip(model, 12))):
        with context:
            found = decoding.Decoder(find_decoder_layers(model), tokenizer, chosen).answers(prompts.ids, range(4))
        for asked, said in zip(prompts.ids, found, strict=True):
            ids = torch.tensor([asked])
            alone = used.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )[0, len(asked) :]
            assert said == alone.tolist()


def drop_copy(model, layer):
    shorter = copy.deepcopy(model)
    drop(shorter, layer)
    return shorter
