"""Odd input through every public function: one line that names the field, what was expected and what there is."""

import copy

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    MusicgenForCausalLM,
)

from hf_cod import (
    LayerMonitor,
    LayerScores,
    collect_statistics,
    diagnose,
    drop,
    drop_layers,
    factorize,
    find_decoder_layers,
    heal,
    lora_ranks,
    narrow,
    perplexity,
    plan_depth,
    plan_fit,
    plan_ranks,
    plan_repeat,
    plan_width,
    prune,
    quantize,
    recover,
    score_layers,
)
from hf_cod.io.models import embedded_model
from hf_cod.layers.checks import sizes_of
from tests.tiny_models import build, outputs


def fit(model, batches):
    return plan_fit(lambda: model, "parameter_share", 0.9, batches, batches, knobs=["rank"], n_verified=1)


def scoring(method):
    return lambda model, batches: score_layers(model, method=method, batches=batches)


# Name -> (model, batches) -> anything: each function that runs a model on batches.
ON_BATCHES = {
    "diagnose": lambda model, batches: diagnose(model, batches=batches),
    "collect_statistics": collect_statistics,
    "owl": scoring("owl"),
    "angular": scoring("angular"),
    "block_influence": scoring("block_influence"),
    "gradient_norm": scoring("gradient_norm"),
    "fisher": scoring("fisher"),
    "layer_drop": scoring("layer_drop"),
    "sensitivity": scoring("sensitivity"),
    "kl": scoring("kl"),
    "auto": scoring("auto"),
    "prune": lambda model, batches: prune(model, 0.5, batches=batches),
    "quantize": lambda model, batches: quantize(model, bits=4, block=32, batches=batches),
    "plan_ranks": lambda model, batches: plan_ranks(model, 0.6, batches=batches),
    "factorize": lambda model, batches: factorize(model, 0.6, batches=batches),
    "narrow": lambda model, batches: narrow(model, 0.7, channel_multiple=8, batches=batches),
    "taylor": lambda model, batches: narrow(model, 0.7, "taylor", "none", channel_multiple=8, batches=batches),
    "plan_depth": lambda model, batches: plan_depth(model, 1, batches=batches),
    "drop_layers": lambda model, batches: drop_layers(model, [1], "measured", batches=batches),
    "plan_repeat": lambda model, batches: plan_repeat(model, 1, batches=batches),
    "plan_fit": fit,
    "recover": lambda model, batches: recover(model, batches, 1),
    "perplexity": perplexity,
}
# Those that need a loss.
ON_LOSSES = ("gradient_norm", "fisher", "sensitivity", "auto", "taylor", "recover", "perplexity")


def ids(*shape, least=3, most=99):
    return torch.randint(least, most, shape, generator=torch.Generator().manual_seed(0))


GOOD = [{"input_ids": ids(3, 9)}, {"input_ids": ids(2, 9)}]
HIDDEN = torch.tensor([[1] * 9, [0] * 9, [1] * 5 + [0] * 4])
LABELS = torch.full((3, 9), -100)
# What is odd -> batches, and what is said of them.
ODD = {
    "unknown token": (
        [*GOOD, {"input_ids": ids(2, 9, least=99, most=100)}],
        "input_ids: .* 0 to 98 .* got 99 of .* 2",
    ),
    "negative token": ([{"input_ids": ids(2, 9) - 99}], r"input_ids: .* 0 to 98 .* got -\d+ of batch 0"),
    "too long": ([*GOOD, {"input_ids": ids(1, 65)}], r"(batches|calibration): .* at most 64 tokens .*wpe, got 65"),
    "no samples": (
        [{"input_ids": ids(0, 9)}],
        r"(batches|calibration): .* one sample .* input_ids \(0, 9\) of batch 0",
    ),
    "no tokens": (
        [{"input_ids": ids(2, 0)}],
        r"(batches|calibration): .* one token, got input_ids \(2, 0\) of batch 0",
    ),
    "nothing": ([{}], r"(batches|calibration): expected input_ids for GPT2LMHeadModel, got nothing of batch 0"),
    "bool": (
        [{"input_ids": ids(2, 9) > 5}],
        r"input_ids: expected whole numbers .* got torch.bool \(2, 9\) of batch 0",
    ),
    "int32": (
        [{"input_ids": ids(2, 9).int()}],
        "input_ids: expected whole numbers .* got torch.int32 .* use torch.int64",
    ),
    "three dimensions": ([{"input_ids": ids(1, 2, 9)}], r"input_ids: .*\(samples, tokens\).* got .*\(1, 2, 9\)"),
    "meta": (
        [{"input_ids": ids(2, 9).to("meta")}],
        "input_ids: expected a dense tensor with values, got one on the meta",
    ),
    "sparse": ([{"input_ids": ids(2, 9).to_sparse()}], "input_ids: expected a dense tensor with values, got a sparse"),
    "both inputs": (
        [{"input_ids": ids(2, 9), "inputs_embeds": torch.zeros(2, 9, 32)}],
        "expected one of input_ids and inputs_embeds, got both of batch 0",
    ),
    "positions": (
        [{"input_ids": ids(2, 9), "position_ids": torch.zeros(2, 3, dtype=torch.long)}],
        r"position_ids: expected 9 per sample, as input_ids has, got \(2, 3\) of batch 0",
    ),
    "mask of NaN": (
        [{"input_ids": ids(2, 9), "attention_mask": torch.full((2, 9), float("nan"))}],
        "attention_mask: expected 0 and 1, got NaN of batch 0",
    ),
    "images": ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], r"expected input_ids for GPT2LM.*, got pixel_values"),
    "all padding": (
        [*GOOD, {"input_ids": ids(3, 9), "attention_mask": HIDDEN}],
        "attention_mask: .* sample 1 of batch 2",
    ),
    "short mask": (
        [{"input_ids": ids(3, 9), "attention_mask": HIDDEN[:, 4:]}],
        r"mask: expected \(3, 9\), .* \(3, 5\)",
    ),
    "fractions": (
        [{"input_ids": ids(3, 9).float()}],
        r"input_ids: expected whole numbers .* got torch\.float32 \(3, 9\)",
    ),
    "one row": (
        [{"input_ids": ids(9)}],
        r"input_ids: expected whole numbers \(samples, tokens\), got torch\.int64 \(9,\)",
    ),
    "lists": ([{"input_ids": ids(3, 9).tolist()}], "(batches|calibration): expected tensors, got list as 'input_ids'"),
    "unknown label": ([{"input_ids": ids(3, 9), "labels": LABELS + 200}], "labels: .* 0 to 98, or -100 .* got 100 of"),
    "few labels": ([{"input_ids": ids(3, 9), "labels": LABELS[0]}], r"labels: expected token ids \(3, 9\), .* \(9,\)"),
    "none": ([], "(batches|statistics|calibration): expected (at least one|statistics, batches, or)"),
}


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("function", ON_BATCHES)
def test_odd_batches_are_refused_and_nothing_is_changed(function, odd):
    batches, message = ODD[odd]
    if odd == "none" and function == "plan_ranks":
        pytest.skip("without batches it plans by the weights alone")
    model = build("gpt2", layers=2)
    before = weights_of(model)
    with pytest.raises(ValueError, match=message) as error:
        ON_BATCHES[function](model, batches)
    assert ": expected" in str(error.value) and "\n" not in str(error.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in ("lists", "one row", "unknown label", "few labels")])
def test_odd_probes_of_a_training(odd):
    """Lists, single rows and labels are not: a probe converts, stacks and drops them."""
    batches, message = ODD[odd]
    message = "probe: expected texts" if odd in ("none", "nothing") else message.replace("(batches|", "(probe|")
    with pytest.raises(ValueError, match=message) as error:
        LayerMonitor(build("gpt2", layers=2), batches)
    assert ": expected" in str(error.value) and "\n" not in str(error.value)


def test_unknown_tokens_of_one_batch_of_a_stream():
    batches = ODD["unknown token"][0]
    with pytest.raises(ValueError, match=r"input_ids: expected token ids from 0 to 98 .* got 99 of batch 2"):
        collect_statistics(build("gpt2", layers=2), (batch for batch in batches))


@pytest.mark.parametrize("function", ["diagnose", "collect_statistics", "prune", "fisher"])
def test_edges_of_what_is_allowed(function):
    """The last token, as many tokens as positions, a lone token beside padding, a mask of two dimensions or four."""
    longest = {"input_ids": ids(2, 64, least=98, most=99), "attention_mask": torch.ones(2, 64)}
    lone = {"input_ids": ids(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] + [0] * 8])}
    assert ON_BATCHES[function](build("gpt2", layers=3), [longest, lone]) is not None
    rotary = build("llama", layers=3)  # without a table of positions
    assert ON_BATCHES[function](rotary, [{"input_ids": ids(1, 80)}, lone]) is not None


@pytest.mark.parametrize("function", ON_LOSSES)
@pytest.mark.parametrize("kind", ["masked", "classes"])
def test_batches_without_labels_where_a_loss_is_needed(function, kind):
    if kind == "masked":
        model = build("bert", layers=2)
    else:
        model = AutoModelForSequenceClassification.from_config(build("gpt2", layers=2).config).eval()
    with pytest.raises(ValueError, match=r"^\w+: (expected|perplexity expects) .*"):
        ON_BATCHES[function](model, GOOD)


def on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build("gpt2", layers=2).config).eval()


def partly_on_meta():
    model = build("gpt2", layers=2)
    model.transformer.h[1].ln_1.to("meta")
    return model


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})).eval()


def clap():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    sound = {
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
    }
    text = {**sizes, "num_hidden_layers": 3, "vocab_size": 99}
    return ClapModel(ClapConfig(text_config=text, audio_config=sound)).eval()


def t5():
    config = CONFIG_MAPPING["t5"](vocab_size=99, d_model=32, d_ff=48, num_heads=4, d_kv=8, num_layers=2)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


MODELS = {
    "meta": (on_meta, r"expected (weights|a loss|.* weights in memory).* (meta|offloaded)"),
    "partly on meta": (partly_on_meta, r"expected (a loss and floating-point )?weights in memory, got "),
    "clip": (clip, r"expected (pixel_values for CLIPModel, got input_ids|.* CLIPModel|.* without a head)"),
    "t5": (t5, r"expected (decoder_input_ids for T5\w+, got input_ids|.* batches without labels|heads)"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("function", ON_BATCHES)
def test_models_that_cannot_run_on_such_batches(function, kind):
    make, message = MODELS[kind]
    with pytest.raises(ValueError, match=message) as error:
        ON_BATCHES[function](make(), GOOD)
    assert "\n" not in str(error.value)


def test_weights_alone_of_a_model_without_weights():
    with pytest.raises(ValueError, match="model: expected weights, got a model on the meta device"):
        score_layers(on_meta(), method="weight_norm")
    assert score_layers(on_meta(), method="depth").values == [2, 1]


def test_what_needs_no_weights_works_on_meta():
    model = on_meta()
    assert plan_width(model, 0.7, 8).heads
    scores = LayerScores("m", "mine", [1.0, 2.0], sizes_of(find_decoder_layers(model)))
    assert lora_ranks(model, scores, r=8)["r"] == 8


def test_encoder_decoders_and_towers_with_all_that_they_read():
    both = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 4)}
    assert collect_statistics(t5(), [both]).squares
    images = {"input_ids": ids(2, 9), "pixel_values": torch.zeros(2, 3, 16, 16)}
    assert collect_statistics(clip(), [images], stack="text").squares
    with pytest.raises(ValueError, match=r"decoder_input_ids: expected token ids from 0 to 98 .* got 99"):
        collect_statistics(t5(), [{**both, "decoder_input_ids": ids(2, 4, least=99, most=100)}])
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = CONFIG_MAPPING["bart"](vocab_size=99, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)
    bart = AutoModelForSeq2SeqLM.from_config(config).eval()  # makes the decoder's tokens itself
    assert collect_statistics(bart, GOOD, layers_path="model.decoder.layers").squares
    bart.config.model_type = "one of which nobody has heard"
    bart.train()
    assert collect_statistics(bart, GOOD, layers_path="model.decoder.layers").squares and bart.training
    with pytest.raises(ValueError, match="input_ids: expected token ids from 0 to 98"):
        collect_statistics(bart, [{"input_ids": ids(2, 9, least=99, most=100)}], stack="decoder")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_drop_after_gradient_checkpointing_was_enabled(family):
    model, plain = build(family), build(family)
    model.gradient_checkpointing_enable()
    assert drop(model, [1]) == drop(plain, [1]) == [0, 2, 3]
    assert torch.equal(outputs(model), outputs(plain))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_drop_of_an_encoder_decoder_after_gradient_checkpointing_was_enabled(stack):
    model, batch = t5(), {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 4)}
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    assert drop(model, [0], stack=stack) == drop(plain, [0], stack=stack) == [1]
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert model.is_gradient_checkpointing
    model.train()(**batch, labels=ids(2, 4)).loss.backward()  # by which layers run twice
    assert all(p.grad is not None for p in model.parameters())


def test_heal_and_its_windows():
    """Texts are cut by a tokenizer; windows of ids are checked as batches are."""
    student, teacher = build("gpt2", layers=2), build("gpt2", layers=2)
    how = {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "eval_samples": 2, "method": "full"}
    with pytest.raises(ValueError, match="data: expected the student's token ids, 0 to 98, got 99 to 99"):
        heal(student, teacher, ids(8, 9, least=99, most=100), sequence_length=9, **how)
    with pytest.raises(ValueError, match=r"sequence_length: expected at most 64 tokens, .* got 65"):
        heal(student, teacher, ids(8, 65), sequence_length=65, **how)
    with pytest.raises(ValueError, match=r"data: expected token ids of shape \(windows, 9\).* at least one window"):
        heal(student, teacher, ids(0, 9), sequence_length=9, **how)


def test_perplexity_says_that_it_has_nothing_to_predict():
    with pytest.raises(ValueError, match="batches: expected at least one token to predict, got none"):
        perplexity(build("llama", layers=2), [{"input_ids": ids(2, 1)}])


def test_embeddings_alone_where_a_loss_needs_token_ids():
    model = build("llama")
    batches = [{"inputs_embeds": torch.randn(2, 5, model.config.hidden_size)}]
    with pytest.raises(ValueError, match=r"^batches: expected input_ids or labels for a loss, got inputs_embeds"):
        perplexity(model, batches)
    with pytest.raises(ValueError, match=r"^batches: expected input_ids or labels for a loss, got inputs_embeds"):
        score_layers(model, method="fisher", batches=batches)


def of_codebooks():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = CONFIG_MAPPING["musicgen"].sub_configs["decoder"](**sizes, num_codebooks=4)
    return MusicgenForCausalLM(config).eval()


ON_TEXTS = {
    "diagnose": diagnose,
    "statistics": lambda model, **given: collect_statistics(model, **given),
    "owl": lambda model, **given: score_layers(model, method="owl", **given),
    "prune": lambda model, **given: prune(model, 0.5, method="wanda", **given),
    "quantize": lambda model, **given: quantize(model, bits=4, **given),
    "perplexity": lambda model, **given: perplexity(model, **given),
}


@pytest.mark.parametrize("function", ON_TEXTS)
def test_decoders_of_codebooks_do_not_read_text(function):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model("pre"))
    with pytest.raises(ValueError, match=r"^model: expected one that reads text, got MusicgenForCausalLM, .* 4 codeb"):
        ON_TEXTS[function](of_codebooks(), tokenizer=tokenizer, texts=["some text of a few words"] * 40)


def test_codes_of_codebooks_are_checked_in_each_table():
    assert collect_statistics(of_codebooks(), [{"input_ids": ids(4, 9, least=0, most=64)}]).tokens
    with pytest.raises(ValueError, match=r"input_ids: expected token ids from 0 to 64 .* got 70 of batch 0"):
        collect_statistics(of_codebooks(), [{"input_ids": ids(4, 9, least=70, most=71)}])
    for function in (narrow, factorize):
        with pytest.raises(ValueError, match=r"^model: expected a class that an Auto class loads, .* Musicgen"):
            function(of_codebooks(), 0.5, batches=[{"input_ids": ids(4, 9, least=0, most=64)}])


@pytest.mark.parametrize("function", ["angular", "prune"])
def test_text_alone_for_a_tower_of_text_beside_one_of_sound(function):
    with pytest.raises(ValueError, match="batches: expected input_features for ClapModel, got input_ids"):
        if function == "prune":
            prune(clap(), 0.5, batches=[{"input_ids": ids(2, 6)}], stack="text")
        else:
            score_layers(clap(), method=function, batches=[{"input_ids": ids(2, 6)}], stack="text")
