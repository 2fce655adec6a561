"""The view of experts: their matrices, read and written by expert, whatever their storage; their router; counts."""

import pytest
import torch
from accelerate import disk_offload
from torch import nn

from hf_cod import find_decoder_layers, prune
from hf_cod.layers.expert_discovery import expert_sets
from hf_cod.layers.experts import ExpertMatrix, ListedMatrix
from tests import references
from tests.layers.test_expert_routing import with_lists
from tests.tiny_models import MIXTURE_TYPES, batch_for, build, build_encoder_decoder, build_mixture

# Type -> names of the last layer's experts, of their router, and which of their matrices are stored as (in, out).
FOUND = {
    "mixtral": ("mlp.experts", "mlp.gate", [False, False]),
    "qwen2_moe": ("mlp.experts", "mlp.gate", [False, False]),
    "qwen3_moe": ("mlp.experts", "mlp.gate", [False, False]),
    "qwen3_next": ("mlp.experts", "mlp.gate", [False, False]),
    "deepseek_v3": ("mlp.experts", "mlp.gate", [False, False]),
    "olmoe": ("mlp.experts", "mlp.gate", [False, False]),
    "gpt_oss": ("mlp.experts", "mlp.router", [True, True]),
    "granitemoe": ("block_sparse_moe.experts", "block_sparse_moe.router", [False, False]),
    "glm4_moe": ("mlp.experts", "mlp.gate", [False, False]),
    "llama4_text": ("feed_forward.experts", "feed_forward.router", [True, True]),
    "dbrx": ("ffn.experts.mlp", "ffn.router.layer", [False, False, True]),
    "jetmoe": ("mlp", "mlp.router.layer", [False, False]),
    "zaya": ("mlp.experts", "mlp.gate.router_mlp.out_proj", [False, False]),
    "inkling_text": ("mlp.experts", "mlp.gate", [False, False]),
}
MATRICES = ("gate_up_proj", "up_proj", "down_proj", "w1", "v1", "w2", "weight", "gate_proj")


@pytest.mark.parametrize("kind", FOUND)
def test_experts_and_their_router(kind):
    stack = find_decoder_layers(build_mixture(kind))
    experts = stack.expert_sets(3)[0]
    prefix = f"{stack.layers_path}.3."
    name, router, transposed = FOUND[kind]
    assert (experts.name, experts.router.name) == (prefix + name, prefix + router)
    assert [matrix.transposed for matrix in experts.matrices] == transposed
    assert experts.count == 4 and not experts.shared and experts.top_k == (1 if kind == "zaya" else 2)
    assert experts.router.shape[0] == 4 + (kind in ("zaya", "inkling_text"))  # one that skips, one that is shared
    assert (experts.router.bias is not None) == (kind == "gpt_oss")
    out, width = experts.matrices[-1].shape[0], experts.matrices[0].shape[1]
    assert out == width == 32, "an expert maps a token to a token"


def test_experts_of_attention_are_a_set_of_their_own():
    found = find_decoder_layers(build_mixture("jetmoe")).expert_sets(0)
    assert [experts.name.split(".", 3)[3] for experts in found] == ["mlp", "self_attention.experts"]
    assert {experts.router.name.split(".", 3)[3] for experts in found} == {
        "mlp.router.layer", "self_attention.experts.router.layer",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["nllb-moe", "switch_transformers"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_experts_in_a_dict_beside_a_dropout(kind, side):
    """One router chooses one of them for each token; NLLB-MoE has experts in some layers only."""
    stack = find_decoder_layers(build_encoder_decoder(kind), side)
    (experts,) = stack.expert_sets(3)
    assert experts.count == len(experts.modules) == 4 and experts.router.name.endswith(".router.classifier")
    assert experts.router.shape == (4, 32) and not experts.shared
    own = {id(p) for m in experts.modules for p in m.parameters() if p.dim() == 2}
    assert sum(experts.sizes()) == sum(p.numel() for p in stack[3].parameters() if id(p) in own) and len(own) == 8
    assert [one.count for one in stack.expert_sets(0)] == ([] if kind == "nllb-moe" else [4])


def test_shared_experts_in_a_bank_have_no_router():
    routed, shared = find_decoder_layers(build_mixture("inkling_text")).expert_sets(3)
    assert shared.name == "model.layers.3.mlp.shared_experts" and shared.shared and shared.router is None
    assert not routed.shared


@pytest.mark.parametrize("kind", ["llama", "recurrent_gemma", "rwkv", "mamba", "xlnet"])
def test_other_3d_parameters_are_no_experts(kind):
    model = build("llama") if kind == "llama" else build_mixture(kind)
    stack = find_decoder_layers(model)
    assert not any(stack.expert_sets(index) or stack.expert_matrices(index) for index in range(len(stack)))


@pytest.mark.parametrize("kind", [*MIXTURE_TYPES, "inkling_text", "recurrent_gemma"])
def test_every_weight_is_counted_once(kind):
    """As a matrix of experts, another matrix, or in no matrix."""
    stack = find_decoder_layers(build_mixture(kind))
    for index, layer in enumerate(stack):
        own = {name: p for name, p in layer.named_parameters() if p.dim() > 1 and "bias" not in name}
        assert stack.count_weights(index) + stack.other_weights(index).total() == sum(p.numel() for p in own.values())
        matrices = dict(stack.matrices(index))
        assert sum(W.numel() for W in matrices.values()) == stack.count_weights(index)
        experts = [matrix.name for one in stack.expert_sets(index) for matrix in one.matrices]
        assert {name for name, W in matrices.items() if W.dim() == 3} == {*experts} and len({*experts}) == len(experts)
        for one in stack.expert_sets(index):
            assert sum(one.sizes()) == sum(matrices[matrix.name].numel() for matrix in one.matrices)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "jetmoe"])
@torch.no_grad()
def test_reading_and_writing_by_expert(kind):
    stack = find_decoder_layers(build_mixture(kind))
    for matrix in stack.expert_matrices(3):
        assert isinstance(matrix, ExpertMatrix)
        before = matrix.parameter.clone()
        W = torch.randn(matrix.shape)
        matrix.write(2, W)
        assert torch.equal(matrix.read(2), W)
        assert int((matrix.parameter != before).sum()) == W.numel(), "no other expert is changed"
        assert torch.equal(dict(stack.matrices(3))[matrix.name][2], W)
    biases = [matrix.bias for matrix in stack.expert_matrices(3)]
    assert [None if b is None else b.shape[0] for b in biases] == [4 if kind == "gpt_oss" else None] * len(biases)


def test_offloaded_experts_are_read_and_not_written(tmp_path):
    model, W = build_mixture("gpt_oss"), torch.zeros(32, 96)
    read = find_decoder_layers(model).expert_matrices(3)[1].read(2).clone()
    disk_offload(model, tmp_path)
    matrix = find_decoder_layers(model).expert_matrices(3)[1]
    assert torch.equal(matrix.read(2), read)
    with pytest.raises(ValueError, match=r"expected weights in memory, got offloaded ones in model.layers.3.mlp.exp"):
        matrix.write(2, W)


@torch.no_grad()
def test_lists_of_experts_are_seen_as_matrices():
    stack = find_decoder_layers(with_lists())
    (experts,) = stack.expert_sets(0)
    assert experts.name == "model.layers.0.mlp.experts" and experts.count == 3
    assert experts.router.name == "model.layers.0.mlp.gate" and experts.router.bias is not None
    assert experts.top_k == 2 and experts.sizes() == [2 * 8 * 32] * 3
    up, down = experts.matrices
    assert isinstance(up, ListedMatrix) and [*up.linears] == [f"model.layers.0.mlp.experts.{e}.0" for e in range(3)]
    assert (up.name, up.shape, down.shape) == ("model.layers.0.mlp.experts.*.0", (8, 32), (32, 8))
    W = torch.randn(8, 32)
    up.write(1, W)
    assert torch.equal(up.read(1), W) and torch.equal(stack.linears(0)["model.layers.0.mlp.experts.1.0"].weight, W)


def test_lists_without_a_router_are_no_experts():
    model = with_lists()
    mlp = model.model.layers[0].mlp
    mlp.gate, mlp.num_experts = nn.Linear(32, 5), 5
    assert not expert_sets(model.model.layers[0], "layers.0")


def test_a_gate_of_one_row_is_no_router_of_one_expert():
    """Qwen2-MoE's shared expert has such a gate."""
    model = build_mixture("qwen2_moe", num_experts=1, num_experts_per_tok=1)
    (experts,) = find_decoder_layers(model).expert_sets(3)
    assert experts.count == 1 and experts.router.name == "model.layers.3.mlp.gate"
    del model.model.layers[3].mlp.gate
    assert find_decoder_layers(model).expert_sets(3)[0].router is None


def test_views_of_a_parameter_are_recognized():
    (up, down) = find_decoder_layers(build_mixture("dbrx")).expert_matrices(3)[::2]
    stored = up.parameter.view(4, 48, 32)
    assert up.place_of(stored[2]) == (2, False) and up.place_of(stored[2].T) == (2, True)
    assert up.place_of(stored) == (None, False) and up.place_of(stored.mT) == (None, True)
    assert up.place_of(stored[2] + 0) is None and up.place_of(stored[2, 1:]) is None
    assert down.place_of(stored[2]) is None and up.place_of(torch.zeros(3)) is None


@pytest.mark.parametrize("kind", ["dbrx", "llama4_text", "jetmoe"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_pruning_reaches_experts_outside_of_the_interface(kind, method):
    model, intact = build_mixture(kind), build_mixture(kind)
    batch = batch_for(model)
    report = prune(model, 0.5, method=method, batches=[batch])
    assert report.results["sparsity"] == pytest.approx(0.5, abs=0.02)
    before = find_decoder_layers(intact).expert_matrices(0)[0]
    after = find_decoder_layers(model).expert_matrices(0)[0]
    inputs = references.routed_experts(intact, batch)[find_decoder_layers(intact).expert_sets(0)[-1].name]
    for expert in range(4):
        W = after.read(expert)
        assert float((W == 0).double().mean()) == pytest.approx(0.5, abs=0.05)
        if method == "wanda" and kind != "jetmoe":  # whose first set is the one of attention
            s = inputs[expert][2].double().norm(dim=0)
            assert torch.equal(W == 0, references.wanda_mask(before.read(expert), s, 0.5))
