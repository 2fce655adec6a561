import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from hf_cod.layers.speed import measure_speed
from hf_cod.layers.stack import find_decoder_layers
from tests.tiny_models import build

PROMPT = torch.arange(3, 23)[None]


@pytest.fixture
def slowed(monkeypatch):
    """Models that take so many seconds for each forward pass, and nothing else; and lists of the lengths they read."""
    now = [0.0]
    monkeypatch.setattr("hf_cod.layers.speed.time.perf_counter", lambda: now[0])

    def made(model, seconds):
        lengths = []

        def wait(module, args, kwargs):
            lengths.append((kwargs["input_ids"] if not args else args[0]).shape[1])
            now[0] += seconds

        model.register_forward_pre_hook(wait, with_kwargs=True)
        return model, lengths

    return made


def test_models_take_turns_and_each_is_as_slow_as_it_is(slowed):
    (slow, lengths), (fast, _) = slowed(build("llama"), 0.05), slowed(build("llama"), 0.01)
    slow.train()
    slow.generation_config.update(do_sample=True, eos_token_id=list(range(99)), num_beams=1)
    own = slow.generation_config
    found = measure_speed({"slow": find_decoder_layers(slow), "fast": find_decoder_layers(fast)}, PROMPT, 2, 3)
    assert lengths == [20, 1, 20, 1, 1, 1, 20, 1, 1, 1], "a prompt, then its next tokens by a cache"
    assert all(len(speed.prompt) == len(speed.generation) == 2 for speed in found.values())
    medians = {name: speed.medians() for name, speed in found.items()}
    assert [medians[name]["prompt"] for name in ("slow", "fast")] == pytest.approx([400, 2000])
    assert [medians[name]["generation"] for name in ("slow", "fast")] == pytest.approx([20, 100])
    assert slow.training and slow.config.use_cache and slow.generation_config is own and own.do_sample


@pytest.mark.parametrize("return_dict", [True, False])
def test_what_does_not_generate_reads_alone(return_dict, slowed):
    model, lengths = slowed(build("bert", return_dict=return_dict), 0.05)
    speed = measure_speed({"bert": find_decoder_layers(model)}, PROMPT, 2)["bert"].medians()
    assert lengths == [20] * 3 and speed["prompt"] == pytest.approx(400)
    assert speed["generation"] is None and speed["prompt_tokens"] == 20


@pytest.mark.parametrize("positions, read", [(12, 8), (64, 20)])
def test_there_are_positions_for_what_is_generated(positions, read):
    model = build("gpt2", n_positions=positions)
    assert measure_speed({"gpt2": find_decoder_layers(model)}, PROMPT, 1, 3)["gpt2"].prompt_tokens == read


def test_a_model_that_fails_when_it_generates_is_timed_on_its_prompt(caplog):
    """transformers gives the cache of LongT5 as many layers as the encoder has."""
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "local_radius": 4}
    config = CONFIG_MAPPING["longt5"](**shape, num_layers=2, num_decoder_layers=3, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    found = measure_speed({"intact": find_decoder_layers(model)}, torch.arange(1, 9)[None], rounds=2)["intact"]
    assert len(found.prompt) == 2 and found.generation == [] and found.medians()["generation"] is None
    assert caplog.text.count("generation is not timed: LongT5ForConditionalGeneration cannot generate") == 1
