import pytest
import torch
from transformers import LongT5Config, LongT5ForConditionalGeneration

from hf_cod.cli.closing import describe_speed
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


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_exhausted_memory_is_no_property_of_the_model(error, monkeypatch):
    def exhausted(*args, **kwargs):
        raise error("no memory")

    model = build("llama")
    monkeypatch.setattr(type(model), "generate", exhausted)
    with pytest.raises(error, match="no memory"):
        measure_speed({"llama": find_decoder_layers(model)}, PROMPT, 1, 3)


def test_a_model_that_fails_to_generate_is_timed_for_prompts(monkeypatch):
    """LongT5 with more layers in the decoder than in the encoder, by which transformers sizes the cache."""
    config = LongT5Config(
        vocab_size=60,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=3,
        num_heads=2,
        local_radius=4,
        decoder_start_token_id=0,
    )
    model = LongT5ForConditionalGeneration(config).eval()
    found = measure_speed({"one": find_decoder_layers(model)}, PROMPT, 2, 3)["one"]
    if found.generation_error is None:  # a transformers that sizes it by the decoder
        assert len(found.generation) == 2
        monkeypatch.setattr(type(model), "generate", lambda *_, **__: [][0])
        found = measure_speed({"one": find_decoder_layers(model)}, PROMPT, 2, 3)["one"]
    assert len(found.prompt) == 2 and found.generation == []
    told = {"speed": {name: found.medians() for name in ("intact", "narrowed")}}
    (sentence,) = describe_speed(told, "narrowed")
    assert "generation is not timed, since it fails (IndexError: " in sentence
