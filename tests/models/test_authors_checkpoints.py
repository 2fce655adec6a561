import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from hf_cod.cli.commands.convert import main
from hf_cod.models import AUTHORS_NORM_TYPES, CodLlamaForCausalLM, from_authors

from .references import language_model
from .tiny import tiny_model, tokens

AUTHORS_CONFIG = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 61,
}
# NORM_TYPE -> the placement of the reference that has its function, for deeppost with the gain sqrt(8).
AUTHORS_FUNCTION = {"scale_pre": "pre", "deeppost": "deepnorm", "post_pre": "mix", "scale_post_pre": "mix"}


def authors_state(norm_type):
    """The state dict of the authors' code: names of its modules, and the buffers that it saves."""
    function = AUTHORS_FUNCTION.get(norm_type, norm_type)
    model = tiny_model("cod_llama", function, num_key_value_heads=4)
    state = {f"module.{name}": weight for name, weight in model.state_dict().items()}
    for i in range(4):
        state[f"module.model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    return function, state


@pytest.mark.parametrize("norm_type", AUTHORS_NORM_TYPES)
def test_checkpoints_of_the_authors(norm_type):
    function, state = authors_state(norm_type)
    post_layers = 2 if function == "mix" else None
    model = from_authors(state, norm_type.upper(), AUTHORS_CONFIG, post_layers)
    assert isinstance(model, CodLlamaForCausalLM)
    assert (model.config.pad_token_id, model.config.max_position_embeddings) == (None, 1024)
    weights = {name.removeprefix("module."): weight for name, weight in state.items()}
    config = {**model.config.to_dict(), "norm_placement": function}
    alpha = math.sqrt(8) if norm_type == "deeppost" else None
    expected = language_model(weights, "llama", config, tokens(), 2, alpha)
    assert (model(tokens()).logits - expected).abs().max() <= 1e-5


def test_a_directory_of_the_authors(tmp_path):
    _, state = authors_state("lns")
    state = {name.removeprefix("module."): weight.clone() for name, weight in state.items()}
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    model = from_authors(tmp_path / "old", "LNS", output=tmp_path / "new")
    assert model.generation_config.pad_token_id is None
    assert "pad_token_id" not in json.loads((tmp_path / "new" / "generation_config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert torch.equal(from_authors(state, "lns", AUTHORS_CONFIG)(tokens()).logits, model(tokens()).logits)


def test_a_pickled_directory_of_the_authors(tmp_path):
    _, state = authors_state("lns")
    state = {name.removeprefix("module."): weight.clone() for name, weight in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")  # what their version of transformers writes
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    expected = from_authors(state, "lns", AUTHORS_CONFIG)
    assert torch.equal(from_authors(tmp_path, "lns")(tokens()).logits, expected(tokens()).logits)


def test_a_directory_of_distributed_training(tmp_path):
    _, state = authors_state("sandwich")
    save_file({name: weight.clone() for name, weight in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    model = from_authors(tmp_path, "sandwich")
    expected = from_authors(state, "sandwich", AUTHORS_CONFIG)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_the_command_takes_the_norm_type_in_any_case(tmp_path):
    _, state = authors_state("lns")
    save_file({name: weight.clone() for name, weight in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    assert main(["authors", str(tmp_path), str(tmp_path / "new"), "--norm-type", "LNS"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "new").norm_placement == "lns"


def test_bad_checkpoints_of_the_authors():
    _, state = authors_state("pre")
    with pytest.raises(ValueError, match=r"norm_type: expected one of pre, .*, got 'mono'"):
        from_authors(state, "mono", AUTHORS_CONFIG)
    with pytest.raises(ValueError, match=r"config: expected the contents of config.json"):
        from_authors(state, "pre")
    with pytest.raises(ValueError, match="post_layers: expected a number from 0 to 4, got None"):
        from_authors(state, "post_pre", AUTHORS_CONFIG)
    with pytest.raises(
        ValueError, match="post_layers: expected None unless norm_type is post_pre or scale_post_pre, got 2"
    ):
        from_authors(state, "pre", AUTHORS_CONFIG, post_layers=2)
    with pytest.raises(ValueError, match=r"source: expected exactly the weights.*post_feedforward_layernorm"):
        from_authors(state, "post", AUTHORS_CONFIG)
