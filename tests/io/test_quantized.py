"""Models that are already quantized, and adapters: each command works, or says at once what to do."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_cod
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from tests.cli.runs import QUICK, TEXT
from tests.tiny_models import build, outputs
from tests.tiny_tokenizers import gpt_like

WIDE = {"hidden_size": 64, "intermediate_size": 128}
COMMANDS = {
    "prune": [],
    "quantize": ["--bits", "4", "--block", "32"],
    "factorize": ["--parameter-share", "0.7"],
    "narrow": ["--parameter-share", "0.7"],
    "drop-layers": ["--n-removed", "1"],
    "repeat-layers": ["--start", "1", "--end", "2"],
    "fit": ["--bits", "6"],
}
ADVICE = "use the model from before, or a dense copy (import hf_cod; m = AutoModelForCausalLM.from_pretrained("


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    (path / "text.txt").write_text(TEXT)
    model = build("llama", **WIDE)
    model.save_pretrained(path / "plain")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(path / "plain", quantization_config=four).save_pretrained(path / "bnb")
    hf_cod.quantize(model, bits=4, block=32)
    model.save_pretrained(path / "own")
    sparse = build("llama", **WIDE)
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.mlp.up_proj.weight[torch.rand_like(layer.mlp.up_proj.weight) < 0.7] = 0
    hf_cod.pack_sparse(sparse).save_pretrained(path / "packed")
    for name in ("plain", "bnb", "own", "packed"):
        gpt_like().save_pretrained(path / name)
    return path


def ends_with(arguments, told, capsys, status=2):
    assert main([str(each) for each in arguments]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1], lines


@pytest.mark.parametrize("kind", ["bnb", "own", "packed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_compressing_commands_say_at_once_what_to_do(folder, tmp_path, kind, command, capsys, monkeypatch):
    monkeypatch.setattr("hf_cod.cli.compression.split_text", lambda *_: pytest.fail("the work has begun"))
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK]
    ends_with([command, folder / kind, *text, *COMMANDS[command]], "expected plain floating-point weights", capsys)


@pytest.mark.parametrize("kind", ["bnb", "own", "packed"])
def test_heal_and_convert_do_so_too(folder, tmp_path, kind, capsys):
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made"]
    told = "student: expected plain floating-point weights, got weights stored by"
    ends_with(["heal", folder / kind, "--teacher", folder / "plain", *text], told, capsys)
    ends_with(["convert", "lns", folder / kind, tmp_path / "made"], "source: expected plain floating-point", capsys)


def test_the_dense_copy_that_the_error_names_is_one(folder, tmp_path, capsys):
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK]
    ends_with(["prune", folder / "own", *text], ADVICE, capsys)
    model = AutoModelForCausalLM.from_pretrained(folder / "own")
    before = outputs(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    gpt_like().save_pretrained(tmp_path / "dense")
    assert torch.allclose(outputs(load_model(str(tmp_path / "dense"), device="cpu")[0]), before, atol=1e-4)
    assert main([str(each) for each in ["prune", tmp_path / "dense", *text]]) == 0


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao"])
@pytest.mark.parametrize("command", ["diagnose", "prune"])
def test_a_missing_package_is_named_with_the_format(folder, tmp_path, method, command, capsys, monkeypatch):
    for module in ("quantizers.quantizer_compressed_tensors", "utils.quantization_config"):
        monkeypatch.setattr(f"transformers.{module}.is_compressed_tensors_available", lambda: False)
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "quant_type": "int8"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    arguments = [command, tmp_path / "model", "--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK]
    ends_with(arguments, "model: ", capsys)
    assert not (tmp_path / "made" / "report.json").exists()


def fp8(path):
    """As DeepSeek stores its models: 8-bit weights with a scale a block."""
    model = build("llama", **WIDE)
    model.save_pretrained(path)
    gpt_like().save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    for key in [key for key in weights if "_proj.weight" in key]:
        scale = weights[key].abs().amax() / 448
        weights[f"{key}_scale_inv"] = scale.reshape(1, 1).float()
        weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": blocks}))
    return model


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator runs FP8 without dequantizing it")
def test_what_transformers_dequantizes_is_a_plain_model(folder, tmp_path):
    model = fp8(tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"), device="cpu", dtype="float32")
    for name, parameter in loaded.named_parameters():
        assert torch.allclose(parameter, model.get_parameter(name), rtol=0.1, atol=0.01), name
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK]
    assert main([str(each) for each in ["prune", tmp_path / "model", *text]]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator may run MXFP4 without dequantizing it")
def test_banks_in_mxfp4_are_dequantized_and_counted(folder, tmp_path):
    """GPT-OSS as it is published: blocks of 32 values of four bits, with a scale of eight bits."""
    model = build("gpt_oss", **WIDE)
    model.save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for key in [key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = weights.pop(key).shape
        shape = (experts, out, width // 32)
        weights[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        weights[f"{key}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=random)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}})
    )
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK, "--no-baseline"]
    command = ["quantize", tmp_path / "model", *text, "--bits", "3.5", "--block", "32", "--experts", "reap"]
    assert main([str(each) for each in command]) == 0
    report, stack = hf_cod.RunReport.load(tmp_path / "made"), hf_cod.find_decoder_layers(model)
    assert report.results["bits"] == pytest.approx(3.5, abs=0.02)
    routers = sum(experts.router.module.weight.numel() for i in range(4) for experts in stack.expert_sets(i))
    assert sum(report.layers["parameters"]) + routers == sum(
        p.numel() for n, p in stack.module_list.named_parameters() if p.dim() > 1 and "bias" not in n
    )


def adapter(folder, path, config, base="plain"):
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    get_peft_model(model, config).save_pretrained(path)
    return path


def test_an_adapter_is_merged_and_can_be_trained(folder, tmp_path):
    """PEFT freezes the base, which the merged model must not be."""
    path = adapter(folder, tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model, _ = load_model(str(path), device="cpu")
    assert all(parameter.requires_grad for parameter in model.parameters())
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", "--sequence-length", "8", "--no-plots"]
    short = ["--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--n-active", "2"]
    assert main([str(each) for each in ["finetune", path, *text, *short]]) == 0
    load_model(str(tmp_path / "made"), device="cpu")


def test_adapters_that_cannot_be_merged_say_so(folder, tmp_path, capsys):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    path = adapter(folder, tmp_path / "prompt", prompt)
    with pytest.raises(ValueError, match="model: expected an adapter that can be merged into its base, got"):
        load_model(str(path), device="cpu")
    lora = adapter(folder, tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    told = "source: expected a model, got an adapter of"
    ends_with(["convert", "lns", lora, tmp_path / "made"], told, capsys)
    build("llama").save_pretrained(tmp_path / "narrow")
    edited = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(
        json.dumps({**edited, "base_model_name_or_path": str(tmp_path / "narrow")})
    )
    with pytest.raises(ValueError, match="model: expected an adapter that PEFT can load, got"):
        load_model(str(lora), device="cpu")


@pytest.mark.parametrize("command", ["prune", "quantize", "drop-layers"])
def test_experts_that_are_each_on_their_own_in_the_files(folder, tmp_path, command):
    """As Mixtral was published; transformers merges them while it loads them."""
    build("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    keys = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in keys
    text = ["--text", folder / "text.txt", "--output", tmp_path / "made", *QUICK]
    assert main([str(each) for each in [command, tmp_path / "model", *text, *COMMANDS[command]]]) == 0
    load_model(str(tmp_path / "made"), device="cpu")


def test_ranks_are_not_planned_for_quantized_weights(folder):
    model, _ = load_model(str(folder / "bnb"), device="cpu")
    with pytest.raises(ValueError, match="model: expected plain floating-point weights, got weights stored by bitsand"):
        hf_cod.plan_ranks(model, 0.7)
