"""Experts in lists, whose config counts them: removed and merged like those of banks."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cod import drop_experts, find_decoder_layers, score_experts
from hf_cod.layers.removal.experts import mixtures_of
from tests.compression.experts.references import masked, merged
from tests.tiny_models import batch_for, outputs


class ListedConfig(LlamaConfig):
    model_type = "listed_llama"
    num_experts: int = 4


class Experts(nn.ModuleDict):
    """With a module beside the experts, as in NLLB-MoE."""

    def __init__(self, count):
        super().__init__(
            {f"expert_{e}": nn.Sequential(nn.Linear(32, 8), nn.SiLU(), nn.Linear(8, 32)) for e in range(count)}
        )
        self.num_experts = count
        self.token_dropout = nn.Dropout(0.1)

    def forward(self, x, index, weights):
        total = torch.zeros_like(x)
        for expert in range(self.num_experts):
            where, place = torch.where(index == expert)
            y = self[f"expert_{expert}"](x[where]) * weights[where, place, None]
            total.index_add_(0, where, self.token_dropout(y))
        return total


class Mixture(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.top_k, self.gate, self.experts = 2, nn.Linear(32, count, bias=False), Experts(count)

    def forward(self, hidden):
        x = hidden.reshape(-1, 32)
        scores, index = self.gate(x).topk(2)
        return self.experts(x, index, scores.softmax(-1)).view_as(hidden)


class ListedLlama(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config.num_experts)


def listed():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return ListedLlama(ListedConfig(**sizes)).eval()


def flat(model, name, expert):
    module = mixtures_of(find_decoder_layers(model))[name].modules[expert]
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@torch.no_grad()
def test_experts_in_a_dict_with_a_dropout_are_removed(tmp_path):
    model = listed()
    removed = {name: [place, 2] for place, name in enumerate(mixtures_of(find_decoder_layers(model)))}
    with masked(model, removed):
        expected = outputs(model)
    drop_experts(model, removed)
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    assert [*model.model.layers[0].mlp.experts] == ["expert_0", "expert_1", "token_dropout"]
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(ListedLlama.from_pretrained(tmp_path)), outputs(model))


@torch.no_grad()
def test_experts_in_a_list_are_merged_with_their_biases():
    model = listed()
    for layer in model.model.layers:  # each removed one resembles one that is kept
        for one, twin in (("expert_1", "expert_2"), ("expert_0", "expert_3")):
            for p, like in zip(layer.mlp.experts[twin].parameters(), layer.mlp.experts[one].parameters(), strict=True):
                p.copy_(like + 0.05 * torch.randn(p.shape))
    intact = copy.deepcopy(model)
    scores = score_experts(model, method="frequency", batches=[batch_for(model)])
    report = drop_experts(model, {name: [2, 3] for name in scores.tokens}, scores, merge=True)
    for name, tokens in scores.tokens.items():
        assert report.results["merged_experts"][name] == {"2": 1, "3": 0}
        expected = merged([flat(intact, name, e) for e in range(4)], [0, 1], tokens)
        for place, wanted in enumerate(expected):
            assert not torch.equal(flat(model, name, place), flat(intact, name, place))
            assert torch.allclose(flat(model, name, place).double(), wanted, atol=1e-5)


def test_a_refused_merge_changes_no_expert():
    model = listed()
    model.config.num_experts, before = 7, copy.deepcopy(model.state_dict())
    names = [*mixtures_of(find_decoder_layers(model))]
    scores = score_experts(model, method="frequency", batches=[batch_for(model)])
    with pytest.raises(ValueError, match="model: expected a config of ListedLlama that counts its 4 experts, got none"):
        drop_experts(model, {name: [1] for name in names}, scores, merge=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
