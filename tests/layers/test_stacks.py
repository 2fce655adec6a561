import copy
import math

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
)

from examples.tiny_architectures import tiny_config
from hf_cod import (
    OwlBnbConfig,
    collect_statistics,
    diagnose,
    drop,
    drop_layers,
    find_decoder_layers,
    perplexity,
    plan_depth,
    prune,
    quantize,
    score_layers,
    skip,
)
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from tests.fresh_processes import run_fresh
from tests.tiny_models import build_encoder_decoder, outputs, seq2seq_batch
from tests.tiny_tokenizers import bert_like

KINDS = ["t5", "bart", "whisper"]
MORE = ["marian", "mbart", "pegasus", "blenderbot", "mt5", "umt5", "longt5", "led", "m2m_100"]
ALL = [*KINDS, *(pytest.param(kind, marks=pytest.mark.families) for kind in MORE)]
SIDES = ["encoder", "decoder"]


def logits(model):
    with torch.no_grad():
        return model(**seq2seq_batch(model)).logits


def generated(model, use_cache):
    inputs = {name: t for name, t in seq2seq_batch(model).items() if not name.startswith("decoder")}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    told = {"output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, use_cache=use_cache, **how, **told).logits)


def without_its_effect(model, side, layer):
    """A copy of a T5 in which one layer adds nothing, but still computes what the others read of it."""
    model = copy.deepcopy(model)
    for name, weight in find_decoder_layers(model, stack=side)[layer].named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            torch.nn.init.zeros_(weight)
    return model


@pytest.mark.parametrize("removed", [0, [1, 3]])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ALL)
def test_drop_on_each_side_of_an_encoder_decoder(kind, side, removed, tmp_path):
    model, other = build_encoder_decoder(kind), "decoder" if side == "encoder" else "encoder"
    intact = logits(model)
    with skip(model, removed, stack=side):
        skipped = logits(model)
        torch.testing.assert_close(generated(model, True), generated(model, False), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), intact), "the end of skip leaves no trace"
    kept = drop(model, removed, stack=side)
    assert torch.equal(logits(model), skipped) and not torch.equal(skipped, intact)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert len(find_decoder_layers(loaded, stack=side)) == len(kept)
    assert len(find_decoder_layers(loaded, stack=other)) == 4
    torch.testing.assert_close(logits(loaded), skipped, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(generated(loaded, True), generated(loaded, False), atol=1e-5, rtol=1e-5)
    assert len(drop(loaded, 0, stack=other)) == 3, "after the reload the other side can follow"


@pytest.mark.parametrize("side", SIDES)
def test_without_its_first_layer_t5_keeps_the_position_biases(side):
    """They lie in the first layer, and all layers read them."""
    model = build_encoder_decoder("t5")
    first = find_decoder_layers(model, stack=side)[0]
    torch.nn.init.normal_(first.layer[0].SelfAttention.relative_attention_bias.weight)
    for layers in (0, 2):
        expected = logits(without_its_effect(model, side, layers))
        with skip(model, layers, stack=side):
            torch.testing.assert_close(logits(model), expected)


@pytest.mark.process
def test_a_process_without_this_package_loads_a_shortened_t5(tmp_path):
    model = build_encoder_decoder("t5")
    drop(model, [0, 2], stack="encoder")
    model.save_pretrained(tmp_path / "model")
    torch.save({**seq2seq_batch(model), "expected": logits(model)}, tmp_path / "batch.pt")
    code = (
        "import sys, torch, transformers\n"
        "batch = torch.load(sys.argv[1] + '/batch.pt')\n"
        "expected = batch.pop('expected')\n"
        "model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "assert torch.allclose(model(**batch).logits, expected, atol=1e-6)\n"
        "how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)\n"
        "ids = [model.generate(batch['input_ids'], use_cache=cache, **how) for cache in (True, False)]\n"
        "assert torch.equal(*ids) and 'hf_cod' not in sys.modules\n"
    )
    done = run_fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_decoder_is_the_default_and_an_earlier_refusal_is_gone():
    model = build_encoder_decoder("t5", num_decoder_layers=3)
    assert len(find_decoder_layers(model)) == len(find_decoder_layers(model, stack="decoder")) == 3
    assert len(find_decoder_layers(model, layers_path="encoder")) == 4
    assert drop_layers(model, 1).layers


def test_what_a_config_cannot_say_of_an_encoder_is_refused_and_nothing_has_changed():
    model = build_encoder_decoder("prophetnet")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"^layers: expected at least 4 layers in the encoder of ProphetNet.* got 3;"):
        drop(model, 0, stack="encoder")
    assert model.config.to_dict() == before and len(find_decoder_layers(model, stack="encoder")) == 4


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_measurements_are_those_of_the_named_side(kind, side):
    model = build_encoder_decoder(kind)
    batch, found = seq2seq_batch(model), []
    stack = find_decoder_layers(model, stack=side)
    for layer in stack:
        layer.register_forward_hook(
            lambda m, args, kwargs, out: found.append((args[0], out[0] if isinstance(out, tuple) else out)),
            with_kwargs=True,
        )
    logits(model)
    cosines = [torch.cosine_similarity(x[:, -1].double(), y[:, -1].double(), dim=-1) for x, y in found]
    expected = [float((cosine.clamp(-1, 1).arccos() / math.pi).mean()) for cosine in cosines]
    report = diagnose(model, batches=[batch], stack=side, show_progress=False)
    torch.testing.assert_close(report.layers["angular_distance"], expected, atol=1e-6, rtol=1e-5)
    assert score_layers(model, method="owl", batches=[batch], stack=side).values


def test_padding_of_both_sides_counts_nowhere():
    """The cross-attention reads the tokens of the encoder, all else those of the decoder."""
    model = build_encoder_decoder("bart")
    ids = torch.randint(5, 80, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    other = torch.tensor([[1] * 5 + [0], [1] * 6])  # as many tokens as the encoder's, but others
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": other}
    alone = [
        {"input_ids": ids[i : i + 1, : mask[i].sum()], "decoder_input_ids": ids[i : i + 1, : other[i].sum()]}
        for i in range(2)
    ]
    for side in SIDES:
        padded, plain = (collect_statistics(model, batches, stack=side) for batches in ([batch], alone))
        assert padded.tokens == plain.tokens
        for name, squares in plain.squares.items():
            torch.testing.assert_close(padded.squares[name], squares, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("side", SIDES)
def test_a_layer_s_drop_in_perplexity_is_that_of_skip(kind, side):
    model = build_encoder_decoder(kind)
    batch = seq2seq_batch(model)
    batch["labels"] = batch["decoder_input_ids"].roll(-1, 1)
    report = diagnose(model, batches=[batch], metrics=["layer_drop"], stack=side, show_progress=False)
    intact = perplexity(model, [batch])
    for index, found in enumerate(report.layers["layer_drop"]):
        with skip(model, index, stack=side):
            assert found == pytest.approx(perplexity(model, [batch]) - intact, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_pruning_and_quantization_change_the_named_side_alone(side):
    model = build_encoder_decoder("bart")
    before = copy.deepcopy(model.state_dict())
    prune(model, 0.5, "sparsegpt", batches=[seq2seq_batch(model)], stack=side)
    inside = f"{find_decoder_layers(model, stack=side).layers_path}."
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(inside) for name in changed)
    quantize(model, OwlBnbConfig(bits=4), stack=side)
    packed = [name for name, m in model.named_modules() if hasattr(m, "bits")]
    assert packed and all(name.startswith(inside) for name in packed)


def towers(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    words = {**sizes, "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    images = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=words, vision_config=images)).eval()
    return GitForCausalLM(GitConfig(**words, vision_config=images)).eval()


@pytest.mark.parametrize("kind", ["clip", "git"])
def test_towers_of_equal_depth_have_names(kind, tmp_path):
    model = towers(kind)
    ids = torch.randint(5, 80, (2, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}
    text, vision = (find_decoder_layers(model, stack=name) for name in ("text", "vision"))
    assert "vision" in vision.layers_path and "vision" not in text.layers_path
    assert vision.config is model.config.vision_config
    if kind == "git":
        assert find_decoder_layers(model).layers_path == text.layers_path, "it generates text"
    else:
        with pytest.raises(
            ValueError, match=r"^stack: expected the name of one .* 'text' \(.*\), 'vision' \(.*\), got"
        ):
            find_decoder_layers(model)
    for stack in ("vision", "text"):
        with skip(model, 0, stack=stack), torch.no_grad():
            expected = model(**batch)[0]
        drop(model, 0, stack=stack)
        with torch.no_grad():
            assert torch.equal(model(**batch)[0], expected)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(**batch)[0], expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_command_works_on_the_named_side(side, tmp_path):
    model = build_encoder_decoder("t5")
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(tmp_path / "model")
    bert_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 40)
    text = ["--text", str(tmp_path / "text.txt"), "--sequence-length", "12", "--max-samples", "4", "--no-plots"]
    more = ["--eval-samples", "4", "--n-removed", "1", "--stack", side, "--output", str(tmp_path / "out")]
    assert main(["drop-layers", str(tmp_path / "model"), *text, *more]) == 0
    loaded, _ = load_model(str(tmp_path / "out"))
    assert [len(find_decoder_layers(loaded, stack=name)) for name in SIDES] == [3 + (name != side) for name in SIDES]
    report = RunReport.load(tmp_path / "out")
    assert report.settings["layers_path"] == side and report.results["perplexity"]["dropped"] > 1


def test_stages_are_named_and_each_can_be_chosen():
    """Swin's layers; those of CvT are no module list."""
    model = AutoModelForImageClassification.from_config(tiny_config("vision/swin")).eval()
    first, second = (f"swin.encoder.layers.{i}.blocks" for i in range(2))
    with pytest.raises(ValueError, match=rf"got 2 stages: {first} \(2 x SwinLayer\), {second} .*; pass the name"):
        find_decoder_layers(model)
    batches = [{"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}]
    assert len(diagnose(model, batches=batches, layers_path=second, show_progress=False).layers["layer_drop"]) == 2
    report = prune(model, 0.5, "wanda", batches=batches, layers_path=first)
    assert report.results["sparsity"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=rf"expected a config that counts the layers of {first}, got none; use skip"):
        drop(model, 1, layers_path=first)
    intact = outputs(model, batches[0])
    with skip(model, 1, layers_path=first):
        assert not torch.equal(outputs(model, batches[0]), intact)
    with pytest.raises(ValueError, match=r"got 3 stages: cvt.* \(10 x CvtLayer\); they are no module lists"):
        find_decoder_layers(AutoModelForImageClassification.from_config(tiny_config("vision/cvt")))
    with pytest.raises(ValueError, match=r"a config that counts the layers \(num_hidden_layers\) of Perc.*, got one w"):
        find_decoder_layers(AutoModelForMaskedLM.from_config(tiny_config("encoder/perceiver")))


WINDOWS = {"depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "embed_dim": 16, "window_size": 4, "patch_size": 2}
# Of four stages, as many as `num_hidden_layers`, and the list that has them.
STAGED = {
    "swin": ({**WINDOWS, "image_size": 64}, "swin.encoder.layers"),
    "swinv2": ({**WINDOWS, "image_size": 64}, "swinv2.encoder.layers"),
    "donut-swin": ({**WINDOWS, "image_size": 64}, "donut.encoder.layers"),
    "convnext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, "convnext.encoder.stages"),
    "segformer": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 3, 4]},
        "segformer.stages",
    ),
}


@pytest.mark.parametrize("kind", STAGED)
def test_stages_are_no_layers_where_the_config_counts_as_many(kind):
    """They take and return hidden states of other widths."""
    sizes, outer = STAGED[kind]
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    batches = [{"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))}]
    for run in (
        lambda: diagnose(model, batches=batches, show_progress=False),
        lambda: plan_depth(model, 1, batches=batches),
        lambda: prune(model, 0.5, "magnitude"),
    ):
        with pytest.raises(ValueError, match=rf"^model: .*, got 4 stages: {outer}\.0.*layers_path='{outer}'$"):
            run()
    for run in (
        lambda: score_layers(model, method="angular", batches=batches, layers_path=outer),
        lambda: diagnose(model, batches=batches, show_progress=False, layers_path=outer),
    ):
        with pytest.raises(
            ValueError, match=r"^layers: expected layers that return hidden states of the shape that the"
        ):
            run()
    report = prune(model, 0.5, "wanda", batches=batches, layers_path=outer)
    assert report.results["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_quantized_stages_are_loaded_again(tmp_path):
    sizes = {**WINDOWS, "image_size": 64, "embed_dim": 64}
    model = AutoModelForImageClassification.from_config(CONFIG_MAPPING["swin"](**sizes)).eval()
    quantize(model, OwlBnbConfig(bits=4), layers_path="swin.encoder.layers")
    batch = {"pixel_values": torch.randn(1, 3, 64, 64)}
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


def test_the_only_list_of_a_model_that_runs_its_layers_several_times():
    """ALBERT's one group; a model with two such lists names both, and parts with numbers of layers are none."""
    model = AutoModelForMaskedLM.from_config(tiny_config("encoder/albert")).eval()
    stack, ids = find_decoder_layers(model), torch.arange(3, 12)[None]
    assert (stack.layers_path, len(stack)) == ("albert.encoder.albert_layer_groups", 1)
    report = prune(model, 0.5, "wanda", batches=[{"input_ids": ids}])
    assert report.results["sparsity"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="expected at least one of 1 layers to be left"):
        drop(model, 0)
    looped = AutoModelForCausalLM.from_config(tiny_config("hrm_text")).eval()
    with pytest.raises(
        ValueError, match=r"got none; module lists: model.L_module.layers .*, model.H_module.layers .*; p"
    ):
        find_decoder_layers(looped)
    high = {name: tensor.clone() for name, tensor in looped.model.H_module.state_dict().items()}
    report = quantize(looped, OwlBnbConfig(bits=4), batches=[{"input_ids": ids}], stack="model.L_module.layers")
    assert all(0 <= error < 0.1 for error in report.layers["error"])
    assert all(torch.equal(tensor, high[name]) for name, tensor in looped.model.H_module.state_dict().items())
    with pytest.raises(ValueError, match=r"got none; module lists: model.layers \(4 x Longcat"):
        find_decoder_layers(AutoModelForCausalLM.from_config(tiny_config("longcat_flash")))
