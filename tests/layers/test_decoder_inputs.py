"""Batches {input_ids, labels} of encoder-decoders: the decoder reads what the model with its head makes of labels."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from hf_cod import (
    collect_statistics,
    diagnose,
    factorize,
    narrow,
    perplexity,
    prune,
    quantize,
    score_layers,
)
from hf_cod.layers.decoder_inputs import decoder_ids
from tests.tiny_models import build_encoder_decoder

KINDS = ("mbart", "led", "m2m_100")
IGNORED = -100


def source_and_labels(ignored=2):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, 80, (2, 7), generator=generator)
    labels[1, len(labels[1]) - ignored :] = IGNORED
    return {"input_ids": torch.randint(5, 80, (2, 12), generator=generator), "labels": labels}


def naive_decoder_ids(kind, labels, config):
    """The tokens before each label: after the start token, or after the last label that counts (mBART)."""
    labels = labels.masked_fill(labels == IGNORED, config.pad_token_id)
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    if kind == "mbart":
        start = labels.gather(1, (labels != config.pad_token_id).sum(1, keepdim=True) - 1)
    return torch.cat([start, labels[:, :-1]], 1)


def both_batches(kind, model):
    batch = source_and_labels()
    return batch, {**batch, "decoder_input_ids": naive_decoder_ids(kind, batch["labels"], model.config)}


def weights_after(change):
    """model, batches -> the weights after a change of a copy, as one vector."""

    def run(model, batches):
        changed = change(copied := copy.deepcopy(model), batches)
        model = changed if isinstance(changed, torch.nn.Module) else copied
        return torch.cat([t.flatten().double() for t in model.state_dict().values()])

    return run


def diagnosed(model, batches):
    metrics = ["angular_distance", "layer_drop", "gradient_norm"]
    return [*diagnose(model, batches=batches, metrics=metrics).layers.values()]


FUNCTIONS = {
    "statistics": lambda model, batches: [*collect_statistics(model, batches).squares.values()],
    "owl": lambda model, batches: score_layers(model, method="owl", batches=batches).values,
    "layer_drop": lambda model, batches: score_layers(model, method="layer_drop", batches=batches).values,
    "fisher": lambda model, batches: score_layers(model, method="fisher", batches=batches).values,
    "perplexity": lambda model, batches: perplexity(model, batches),
    "diagnose": diagnosed,
    "prune": weights_after(lambda model, batches: prune(model, 0.5, method="wanda", batches=batches)),
    "quantize": weights_after(lambda model, batches: quantize(model, bits=4, batches=batches)),
    "factorize": weights_after(lambda model, batches: factorize(model, 0.5, batches=batches)),
    "narrow": weights_after(lambda model, batches: narrow(model, 0.7, batches=batches)),
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


EACH = [("mbart", function) for function in FUNCTIONS]
EACH += [(kind, function) for kind in ("led", "m2m_100") for function in ("statistics", "perplexity", "prune")]


@pytest.mark.parametrize(("kind", "function"), EACH)
def test_labels_are_what_explicit_decoder_inputs_are(kind, function):
    model = build_encoder_decoder(kind, **({"attention_window": [8] * 4} if kind == "led" else {}))
    with_labels, explicit = both_batches(kind, model)
    assert same(FUNCTIONS[function](model, [with_labels]), FUNCTIONS[function](model, [explicit]))


@pytest.mark.parametrize("kind", [*KINDS, "t5", "bart", "whisper"])
def test_the_models_own_rule_is_found_and_leaves_no_trace(kind):
    model, batch = build_encoder_decoder(kind), source_and_labels()
    if kind == "whisper":
        frames = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        batch = {"input_features": torch.randn(frames), "labels": batch["labels"]}
    made = decoder_ids(model, batch)
    assert torch.equal(made, naive_decoder_ids(kind, batch["labels"], model.config))
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**given, decoder_input_ids=made).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_that_a_model_makes_no_decoder_inputs_of_are_refused():
    model = build_encoder_decoder("mbart")
    headless = AutoModel.from_config(model.config).eval()
    for function in (FUNCTIONS["statistics"], FUNCTIONS["prune"], FUNCTIONS["owl"]):
        with pytest.raises(ValueError, match="batches: expected decoder_input_ids for MBartModel, got input_ids, l"):
            function(headless, [source_and_labels()])
    unknown = source_and_labels()
    unknown["labels"][0, 0] = model.config.vocab_size
    with pytest.raises(ValueError, match=r"labels: expected token ids from 0 to \d+ .* got \d+ of batch 0"):
        collect_statistics(model, [unknown])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_of_images_and_a_decoder_of_another_width(dtype):
    """The model projects the encoder's states to the width of the decoder, before it runs that."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}
    decoder = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True, is_decoder=True)
    encoder = ViTConfig(hidden_size=24, patch_size=8, **sizes)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    model = VisionEncoderDecoderModel(config).eval().to(dtype)
    labels = source_and_labels()["labels"]
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype), "labels": labels}
    shifted = torch.cat([torch.full((2, 1), 2), labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, 0)], 1)
    explicit = {"pixel_values": batch["pixel_values"], "decoder_input_ids": shifted}
    assert torch.equal(decoder_ids(model, batch), shifted)
    for stack in ("decoder", "encoder"):
        options = {"method": "angular", "layers_path": stack}
        found, expected = (score_layers(model, batches=[each], **options).values for each in (batch, explicit))
        assert found == expected


def test_a_classifier_that_makes_the_decoders_tokens_of_its_input():
    """BART classifies by the end token, which is behind the first tokens of the samples."""
    config = build_encoder_decoder("bart").config
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = source_and_labels()["input_ids"]
    ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    assert len(score_layers(model, method="angular", batches=[batch]).values) == len(model.model.decoder.layers)
    before = prune(model, 0.5, batches=[batch]).summary
    assert "50.00%" in before[0]
