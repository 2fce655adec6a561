import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
)

from hf_cod.cli.main import main as cli
from hf_cod.models import fold_lns, from_authors, to_lns
from tests.fresh_processes import run_fresh

from .tiny import TEXT, tiny_model, tokens

CONVERSIONS = [fold_lns, to_lns, lambda source, output=None: from_authors(source, "pre", output=output)]


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["fold_lns", "to_lns", "from_authors"])
def test_a_source_that_is_not_there(convert, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "weightless")
    places = [tmp_path / "nowhere", "nobody/nothing", tmp_path / "empty"]
    if convert is not fold_lns:
        places.append(tmp_path / "weightless")
    for place in places:
        with pytest.raises(
            ValueError, match=f"source: expected a directory with a checkpoint or a Hub id, got '{place}'"
        ):
            convert(place)


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["fold_lns", "to_lns", "from_authors"])
def test_a_damaged_source(convert, tmp_path):
    model = tiny_model("cod_llama", "lns")
    (model if convert is fold_lns else fold_lns(model)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"source: expected a directory with a checkpoint or a Hub id, got .*incomplete"
    ):
        convert(tmp_path)


@pytest.mark.parametrize("convert", CONVERSIONS, ids=["fold_lns", "to_lns", "from_authors"])
def test_an_output_that_exists_is_refused_before_anything_is_read(convert, tmp_path):
    with pytest.raises(ValueError, match="output: expected a path that does not exist yet"):
        convert(tmp_path / "nowhere", tmp_path)


def test_a_hub_id_brings_its_tokenizer(tmp_path, monkeypatch):
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    fold_lns(tiny_model("cod_llama", "lns"), repository / "snapshots" / commit)
    for name in ("tokenizer.json", "chat_template.json"):
        (repository / "snapshots" / commit / name).write_text(f'"{name}"')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    to_lns("someone/tiny", tmp_path / "lns")
    assert json.loads((tmp_path / "lns" / "tokenizer.json").read_text()) == "tokenizer.json"
    assert json.loads((tmp_path / "lns" / "chat_template.json").read_text()) == "chat_template.json"
    assert not (tmp_path / "lns" / "vocab.json").exists()


class ReadTimeout(Exception):
    """Stands for the error of the library beneath the Hub's, which reaches the caller as it is."""


ReadTimeout.__module__ = "httpx"


@pytest.mark.parametrize("error", [OSError("no route"), ReadTimeout("too slow")], ids=["refused", "slow"])
def test_a_network_that_fails_at_the_tokenizer_writes_nothing(error, tmp_path, monkeypatch, capsys):
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path / "source")
    asked = []

    def cached_file(source, name, **options):
        asked.append(name)
        if name == "tokenizer.json":
            raise error
        return None

    monkeypatch.setattr("hf_cod.models.checkpoint.cached_file", cached_file)
    before = sorted(tmp_path.iterdir())
    assert cli(["convert", "stock", str(tmp_path / "source"), str(tmp_path / "stock")]) == 2
    told = capsys.readouterr().err
    assert "hf-cod convert: error: source: expected an answer from the Hub for tokenizer.json of" in told
    assert str(error) in told
    assert len(asked) > 1 and sorted(tmp_path.iterdir()) == before


def test_our_own_mistakes_are_not_taken_for_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cod.models.checkpoint.cached_file", lambda *args, **kwargs: {}["bug"])
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path / "source")
    with pytest.raises(KeyError, match="bug"):
        fold_lns(tmp_path / "source", tmp_path / "stock")


OUTSIDE = """
import sys, torch
from transformers import AutoModelForCausalLM
logits = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    logits[name] = model(torch.load(sys.argv[1])).logits
assert "hf_cod" not in sys.modules
torch.save(logits, "logits.pt")
"""


@pytest.mark.process
def test_the_stock_model_loads_without_us(tmp_path):
    models = {name: tiny_model(name, "lns") for name in ("cod_llama", "cod_qwen2", "cod_qwen3")}
    for name, model in models.items():
        fold_lns(model, tmp_path / name)
    torch.save(tokens(), tmp_path / "tokens.pt")
    done = run_fresh(OUTSIDE, "tokens.pt", *models, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = torch.load(tmp_path / "logits.pt")
    for name, model in models.items():
        assert (logits[name] - model(tokens()).logits).abs().max() <= 1e-5, name


def test_directories_in_and_out(tmp_path):
    model = tiny_model("cod_qwen2", "lns")
    model.save_pretrained(tmp_path / "lns")
    (tmp_path / "lns" / "tokenizer.json").write_text("{}")
    fold_lns(tmp_path / "lns", tmp_path / "new" / "stock")
    written = {path.name for path in (tmp_path / "new" / "stock").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert AutoConfig.from_pretrained(tmp_path / "new" / "stock").model_type == "qwen2"

    to_lns(tmp_path / "new" / "stock", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (again(tokens()).logits - model(tokens()).logits).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="output: expected a path that does not exist yet"):
        fold_lns(tmp_path / "lns", tmp_path / "new" / "stock")


def test_a_tokenizer_of_its_own_code_comes_along(tmp_path):
    fold_lns(tiny_model("cod_llama", "lns"), tmp_path / "stock")
    own, (slow, fast) = "someone/else--tokenization_far.Far", ("tokenization_own.Own", None)
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [slow, fast], "AutoProcessor": own}}
    (tmp_path / "stock" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "stock" / "tokenization_own.py").write_text("class Own: pass\n")
    to_lns(tmp_path / "stock", tmp_path / "lns")
    assert (tmp_path / "lns" / "tokenization_own.py").read_text() == "class Own: pass\n"
    assert not (tmp_path / "lns" / "tokenization_far.py").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("cod_llama", "lns")

    def fail(self, target):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.rename", fail)
    with pytest.raises(OSError, match="no space left"):
        fold_lns(model, tmp_path / "stock")
    assert not list(tmp_path.iterdir())
