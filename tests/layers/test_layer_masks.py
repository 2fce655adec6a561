"""Padded sound: the tokens that count are those of the mask that the model makes for its layers."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForAudioClassification, AutoModelForCTC, AutoModelForSpeechSeq2Seq

from hf_cod import collect_statistics, diagnose, find_decoder_layers, prune, score_layers
from hf_cod.layers.task import model_inputs

SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 30,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HEADS = {"hubert": AutoModelForAudioClassification}


def sound_model(kind, implementation="sdpa"):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SOUND)
    return HEADS.get(kind, AutoModelForCTC).from_config(config, attn_implementation=implementation).eval()


def padded(kind):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 800, dtype=torch.long)
    mask[1, 560:] = 0
    labels = torch.tensor([0, 1]) if kind == "hubert" else torch.tensor([[3, 4, 5], [6, 7, -100]])
    return {"input_values": torch.randn(2, 800, generator=generator), "attention_mask": mask, "labels": labels}


def first_inputs(model, batch, name):
    """(S, T, d): what a matrix gets."""
    found = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(**model_inputs(model, batch))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_padding_of_sound_does_not_count(kind, implementation):
    model, batch = sound_model(kind, implementation), padded(kind)
    name = f"{find_decoder_layers(model).layers_path}.2.attention.q_proj"
    x = first_inputs(model, batch, name)
    # The convolutions have no padding: (n - 10) // 5 + 1, then (n - 3) // 2 + 1.
    real = [((n - 10) // 5 + 1 - 3) // 2 + 1 for n in (800, 560)]
    assert real[0] == x.shape[1] > real[1]
    naive = sum(sample[:count].double().square().sum(0) for sample, count in zip(x, real, strict=True))
    statistics = collect_statistics(model, [batch])
    assert int(statistics.tokens[name]) == sum(real)
    torch.testing.assert_close(statistics.squares[name].double(), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sew", "wavlm", "wav2vec2-conformer"])
def test_the_mask_is_that_of_the_layers(kind):
    """Of a model that makes fewer tokens inside of its encoder, one with a matrix on each head, one with distances."""
    model, batch = sound_model(kind, "eager"), padded(kind)
    stack = find_decoder_layers(model)
    mask = stack.mask(model_inputs(model, batch))
    tokens = first_inputs(model, batch, next(name for name in stack.linears(0) if "dense" in name)).shape[1]
    assert mask.shape == (2, tokens) and mask[0].all() and mask[1, 0] and not mask[1, -1]
    # WavLM passes the matrices of its attention to torch, so that they see no tokens.
    counted = {name: int(n) for name, n in collect_statistics(model, [batch]).tokens.items() if n}
    assert len(counted) >= 9
    each = {name: {"linear_pos": 2 * tokens - 1, "gru_rel_pos_linear": 4 * int(mask.sum())} for name in counted}
    assert counted == {name: each[name].get(name.rpartition(".")[2], int(mask.sum())) for name in counted}


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_all_functions_run_on_padded_sound(kind):
    model, batch = sound_model(kind), padded(kind)
    report = diagnose(model, batches=[batch], metrics=["angular_distance", "layer_drop", "output_variance"])
    assert all(value is not None for value in report.layers["layer_drop"])
    pruned = copy.deepcopy(model)
    assert prune(pruned, 0.5, method="sparsegpt", batches=[batch])
    assert len(score_layers(model, method="owl", batches=[batch]).values) == 3


def test_a_decoder_reads_the_tokens_of_padded_sound():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    ends = {"max_source_positions": 64, "max_target_positions": 64, "conv_channels": 16, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForSpeechSeq2Seq.from_config(
        CONFIG_MAPPING["speech_to_text"](**sizes, **heads, **ends, input_feat_per_channel=8)
    ).eval()
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, 28:] = 0
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    batch = {"input_features": torch.randn(2, 48, 8), "attention_mask": mask, "labels": labels}
    statistics = collect_statistics(model, [batch], layers_path="decoder")
    # Two convolutions with a stride of 2: 48 and 28 frames become 12 and 7 tokens.
    assert int(statistics.tokens["model.decoder.layers.0.encoder_attn.k_proj"]) == 12 + 7
    assert int(statistics.tokens["model.decoder.layers.0.self_attn.k_proj"]) == 6
    assert int(collect_statistics(model, [batch], layers_path="encoder").tokens["model.encoder.layers.0.fc1"]) == 19
