"""Everything that came with a model is in the directory that a command writes, and loads in a fresh process."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_cod import RunReport
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.settings import ModelSettings
from hf_cod.io.whole_checkpoint import WholeCheckpoint
from hf_cod.models.checkpoint import find_companions
from tests.cli.runs import QUICK, TEXT
from tests.fresh_processes import run_fresh
from tests.tiny_models import build
from tests.tiny_tokenizers import _tokenizer, gpt_like

TRAINED = ["--sequence-length", "8", "--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--n-active", "2"]


def run(folder, command, output, *more, trained=False):
    text = ["--text", str(folder / "text.txt"), "--device", "cpu", "--no-plots"]
    samples = TRAINED if trained else [*QUICK, "--eval-samples", "4"]
    assert main([command, str(folder / "model"), *text, *samples, "--output", str(folder / output), *more]) == 0
    return RunReport.load(folder / output).notes


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TEXTS = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava(path):
    """A model that sees, with its processor."""
    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXTS), image_token_index=2)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    words = _tokenizer(["<unk>", "<eos>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    ).save_pretrained(path)


SEE = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
picture = Image.new("RGB", (20, 20), (9, 200, 30))
chat = processor.apply_chat_template([{"role": "user", "content": "<image> one two"}], tokenize=False)
inputs = processor(text=chat, images=picture, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
torch.save((dict(inputs), model(**inputs).logits.detach()), sys.argv[2])
"""


@pytest.mark.process
@pytest.mark.parametrize("command", ["prune", "factorize"])
def test_a_model_that_sees_still_sees(folder, command):
    """In a process without hf_cod, with processor and chat template; of a class of transformers and of ours."""
    llava(folder / "model")
    more = ["--parameter-share", "0.9", "--no-speed"] if command == "factorize" else []
    run(folder, command, "made", *more)
    done = run_fresh(SEE, folder / "made", folder / "seen.pt", environment={"HF_MODULES_CACHE": str(folder / "code")})
    assert done.returncode == 0, done.stderr[-2000:]
    inputs, logits = torch.load(folder / "seen.pt", weights_only=True)
    model, _ = load_model(str(folder / "made"), device="cpu")
    assert "pixel_values" in inputs and torch.allclose(model(**inputs).logits, logits, atol=1e-5)


CODE = {
    "configuration_tiny.py": """
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"
    gain: float = 2.0
""",
    "gains.py": """
def scaled(logits, gain):
    return logits * gain
""",
    "modeling_tiny.py": """
from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig
from .gains import scaled


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, input_ids=None, attention_mask=None, labels=None, **more):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
        out.logits = scaled(out.logits, self.config.gain)
        return out
""",
    # Of another head: transformers copies only the code of the class that it has loaded.
    "pooling.py": """
def last(states):
    return states[:, -1]
""",
    "classifying_tiny.py": """
from transformers import LlamaForSequenceClassification

from .configuration_tiny import TinyConfig
from .pooling import last


class TinyForSequenceClassification(LlamaForSequenceClassification):
    config_class = TinyConfig
""",
}
HEADS = {
    "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    "AutoModelForSequenceClassification": "classifying_tiny.TinyForSequenceClassification",
}
RUN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__, type(model).__module__
inputs = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("one two three", return_tensors="pt")
torch.save((inputs["input_ids"], model(input_ids=inputs["input_ids"]).logits.detach()), sys.argv[2])
"""


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """Code of models is cached in a directory of the test, not in that of the user."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


def remote(path):
    build("llama").save_pretrained(path)
    gpt_like().save_pretrained(path)
    for name, code in CODE.items():
        (path / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", **HEADS}
    edit(path / "config.json", model_type="tiny_remote", architectures=["TinyForCausalLM"], auto_map=auto_map)


@pytest.mark.process
@pytest.mark.usefixtures("code_cache")
def test_a_model_with_its_own_code_takes_it_along(folder):
    remote(folder / "model")
    run(folder, "prune", "made", "--trust-remote-code")
    assert {*CODE} <= {path.name for path in (folder / "made").iterdir()}
    for path in (folder / "model").iterdir():
        path.unlink()
    # The same cache as here: the process inherits the path on which its modules are found.
    cache = {"HF_MODULES_CACHE": str(folder / "modules")}
    done = run_fresh(RUN, folder / "made", folder / "out.pt", environment=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    ids, logits = torch.load(folder / "out.pt", weights_only=True)
    model, _ = load_model(str(folder / "made"), device="cpu", trust_remote_code=True)
    assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-5)


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["quantize", "--bits", "4", "--block", "32"], "packed and quantized weights require"),
        (["factorize", "--parameter-share", "0.7"], "expected a class of transformers or hf_cod"),
        (["narrow", "--parameter-share", "0.7"], "expected a class of transformers or hf_cod"),
    ],
)
def test_what_cannot_be_saved_with_own_code_is_refused_before_the_work(folder, command, told, capsys, monkeypatch):
    remote(folder / "model")
    monkeypatch.setattr("hf_cod.cli.compression.split_text", lambda *_: pytest.fail("the work has begun"))
    text = ["--text", str(folder / "text.txt"), "--output", str(folder / "made"), "--trust-remote-code"]
    assert main([command[0], str(folder / "model"), *text, *QUICK, *command[1:]]) == 2
    assert told in capsys.readouterr().err


def deepseek(path):
    """Three layers, and in the file a fourth that predicts the token after the next."""
    model = build("deepseek_v3", layers=3, hidden_size=64, intermediate_size=64)
    model.save_pretrained(path)
    gpt_like().save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    fourth = {key.replace(".2.", ".3.", 1): tensor + 1 for key, tensor in weights.items() if ".layers.2." in key}
    fourth |= {"model.layers.3.eh_proj.weight": torch.randn(64, 128), "model.layers.3.enorm.weight": torch.ones(64)}
    save_file({**weights, **fourth}, path / "model.safetensors", metadata={"format": "pt"})
    return fourth


def stored(directory):
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("command", [["prune"], ["quantize", "--bits", "4", "--block", "32"], ["finetune"]])
def test_layers_that_predict_further_tokens_are_kept(folder, command):
    fourth = deepseek(folder / "model")
    notes = run(folder, command[0], "made", *command[1:], trained=command[0] == "finetune")
    found = stored(folder / "made")
    assert all(torch.equal(found[key], tensor) for key, tensor in fourth.items())
    index = json.loads((folder / "made" / "model.safetensors.index.json").read_text())
    files = {name: {*load_file(folder / "made" / name)} for name in set(index["weight_map"].values())}
    assert {key: name for name, keys in files.items() for key in keys} == index["weight_map"]
    assert index["metadata"]["total_size"] > 0
    assert json.loads((folder / "made" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert any(f"{len(fourth)} weights that transformers does not load were copied" in note for note in notes)
    load_model(str(folder / "made"), device="cpu")


def test_layers_that_predict_further_tokens_are_promised_no_more(folder):
    """They would be taken for one of the model's own layers, or have the numbers of others."""
    fourth = deepseek(folder / "model")
    notes = run(folder, "drop-layers", "made", "--n-removed", "1", "--no-protect", "--no-speed")
    assert not [key for key in stored(folder / "made") if ".layers.3." in key]
    assert json.loads((folder / "made" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert [note for note in notes if f"{len(fourth)} weights" in note and "were left out: model.layers.3." in note]
    assert "num_nextn_predict_layers was 1 and is now 0: the weights for multi-token prediction are left out" in notes
    assert load_model(str(folder / "made"), device="cpu")[0].config.num_hidden_layers == 2


def test_a_promise_that_the_source_does_not_keep_is_withdrawn(folder):
    build("deepseek_v3", layers=3).save_pretrained(folder / "model")
    gpt_like().save_pretrained(folder / "model")
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    whole = WholeCheckpoint(str(folder / "model"), ModelSettings(), model, tokenizer)
    (note,) = whole.save(model, folder / "made")
    assert note.endswith("the weights for multi-token prediction are not in the files of the model")
    assert json.loads((folder / "made" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_weights_that_no_model_has_are_still_an_error(folder):
    deepseek(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    save_file({**weights, "model.layers.4.enorm.weight": torch.ones(64)}, folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.4\.enorm\.weight"):
        load_model(str(folder / "model"), device="cpu")


def test_an_invalid_generation_config_is_mended_before_the_work(folder):
    """Trainer changes it, so transformers would refuse to save it after the training."""
    build("llama").save_pretrained(folder / "model")
    gpt_like().save_pretrained(folder / "model")
    edit(folder / "model" / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9, max_new_tokens=7)
    notes = run(folder, "finetune", "made", trained=True)
    saved = json.loads((folder / "made" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7 and not {"temperature", "top_p"} & saved.keys()
    assert "invalid flags were removed from generation_config.json: temperature=0.6, top_p=0.9" in notes


def test_a_generation_config_beyond_repair_is_an_error_before_the_work(folder):
    model = build("llama")
    model.save_pretrained(folder / "model")
    model.generation_config.max_new_tokens = "many"
    with pytest.raises(ValueError, match=r"expected a generation_config\.json that transformers can save, got"):
        WholeCheckpoint(str(folder / "model"), ModelSettings(), model, None)


def test_a_chat_template_stays_whose_it_is(folder):
    """A processor's template in the older file is not hidden by the tokenizer's; further templates come along."""
    source = folder / "model"
    llava(source)
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    edit(source / "tokenizer_config.json", chat_template="the tokenizer's own")
    (source / "video_preprocessor_config.json").write_text(json.dumps({"fps": 3}))
    model, tokenizer = load_model(str(source), device="cpu")
    whole = WholeCheckpoint(str(source), ModelSettings(), model, tokenizer)
    assert whole.save(model, folder / "made") == []
    assert AutoProcessor.from_pretrained(folder / "made").chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(folder / "made").chat_template == "the tokenizer's own"
    assert json.loads((folder / "made" / "video_preprocessor_config.json").read_text()) == {"fps": 3}


def test_further_chat_templates_come_along(folder):
    tokenizer = gpt_like()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    assert main(["convert", "lns", str(folder / "model"), str(folder / "made")]) == 0
    assert AutoTokenizer.from_pretrained(folder / "made").chat_template == tokenizer.chat_template


def test_what_sentence_transformers_runs_after_the_model_comes_along(folder):
    source, weights = folder / "model", {"linear.weight": torch.eye(4)}
    build("llama").save_pretrained(source)
    gpt_like().save_pretrained(source)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    files = {"modules.json": modules, "sentence_bert_config.json": {"max_seq_length": 8}}
    files |= {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}, "2_Dense/config.json": {"in_features": 4}}
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps(content))
    save_file(weights, source / "2_Dense" / "model.safetensors")
    run(folder, "prune", "made", "--sparsity", "0.5", "--method", "magnitude")
    assert {name: json.loads((folder / "made" / name).read_text()) for name in files} == files
    assert torch.equal(load_file(folder / "made" / "2_Dense" / "model.safetensors")["linear.weight"], torch.eye(4))
    (source / "modules.json").write_text(json.dumps([{"path": "../other"}]))
    with pytest.raises(ValueError, match=r"^modules: expected folders in the same directory, got '../other'"):
        find_companions(source)
