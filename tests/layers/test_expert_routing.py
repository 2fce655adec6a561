"""What enters and leaves experts, whatever runs them: by transformers' interface, by products, or as modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from examples.tiny_architectures import build as build_type
from hf_cod import collect_statistics, find_decoder_layers, plan_experts, prune
from hf_cod.layers.expert_routing import IMPLEMENTATION, observed_experts
from hf_cod.layers.removal.experts import mixtures_of
from tests import references
from tests.tiny_models import MIXTURE_TYPES, MIXTURES, batch_for, build, build_mixture


def observed(model, batch, enters=True):
    """(matrix, expert) -> (x, tokens); (experts, expert) -> what left; and the logits."""
    inputs, outputs = {}, {}
    stack = find_decoder_layers(model)

    def enter(name, expert, x, tokens):
        assert (name, expert) not in inputs
        inputs[name, expert] = x, tokens

    def leave(routed):
        assert (routed.experts.name, routed.expert) not in outputs
        outputs[routed.experts.name, routed.expert] = routed

    with torch.no_grad(), observed_experts(stack, range(len(stack)), enter if enters else None, leave):
        logits = model(**batch).logits
    return inputs, outputs, logits


@pytest.mark.parametrize("kind", MIXTURE_TYPES)
def test_what_enters_and_leaves_against_naive_code(kind):
    model = build_mixture(kind)
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        inputs, outputs, found = observed(model, batch)
        assert torch.equal(model(**batch).logits, expected), "all hooks are gone"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    naive = references.routed_experts(model, batch)
    sets = [experts for i in range(4) for experts in find_decoder_layers(model).expert_sets(i)]
    assert {experts.name for experts in sets} == naive.keys() and naive
    for experts in sets:
        for expert, (tokens, weights, x, added) in enumerate(naive[experts.name]):
            if not len(tokens):
                assert (experts.name, expert) not in outputs
                continue
            routed = outputs[experts.name, expert]
            order, wanted = routed.tokens.argsort(), tokens.argsort()
            assert torch.equal(routed.tokens[order], tokens[wanted])
            torch.testing.assert_close(routed.weights[order], weights[wanted])
            torch.testing.assert_close(routed.outputs[order], added[wanted], atol=1e-4, rtol=1e-4)
            for matrix in experts.matrices:
                rows, at = inputs[matrix.name, expert]
                assert torch.equal(at, routed.tokens) and rows.shape == (len(tokens), matrix.shape[1])
            torch.testing.assert_close(inputs[experts.matrices[0].name, expert][0][order], x[wanted])


@pytest.mark.parametrize("kind", ["llama4_text", "dbrx", "jetmoe"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_statistics_of_experts_outside_of_the_interface(kind, padding):
    model = build_mixture(kind)
    batch = batch_for(model, padding)
    found = collect_statistics(model, [batch])
    real = batch["attention_mask"].bool().flatten()
    stack = find_decoder_layers(model)
    naive = references.routed_experts(model, batch)
    for experts in (one for i in range(4) for one in stack.expert_sets(i)):
        name = experts.matrices[0].name
        for expert, (tokens, _, x, _) in enumerate(naive[experts.name]):
            x = x[real[tokens]]
            assert found.tokens[name][expert] == len(x)
            torch.testing.assert_close(found.squares[name][expert], x.double().square().sum(0), rtol=1e-5, atol=1e-9)


class Mixture(nn.Module):
    """A list of experts, as in models with code of their own; `way` is how tokens get to them and back."""

    def __init__(self, way):
        super().__init__()
        self.num_experts, self.top_k, self.way = 3, 2, way
        self.gate = nn.Linear(32, 3, bias=True)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 8), nn.SiLU(), nn.Linear(8, 32, bias=False)) for _ in range(3)
        )

    def forward(self, hidden):
        x = hidden.reshape(-1, 32)
        weights, index = self.gate(x).softmax(-1).topk(2)
        total = torch.zeros_like(x)
        for expert, module in enumerate(self.experts):
            where, place = torch.where(index == expert)
            if self.way == "gathered":
                y = module(x[None, where].reshape(-1, 32)) * weights[where, place, None]
            else:  # as by a product with a matrix of zeros and ones, which is not followed
                y = torch.eye(len(where)) @ module(torch.eye(len(x))[where] @ x)
                y = torch.einsum("nd,n->nd", y, weights[where, place])
            total.index_add_(0, where, y)
        return total.view_as(hidden)


def with_lists(way="gathered"):
    model = build("llama", layers=2)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mixture(way)
    return model


def test_lists_of_experts():
    model = with_lists()
    batch = batch_for(model)
    inputs, outputs, logits = observed(model, batch)
    assert not inputs, "their matrices are Linears, with hooks of their own"
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert len(outputs) == 6
    mlp, seen = model.model.layers[0].mlp, []
    handle = mlp.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        x = seen[0][0].reshape(-1, 32)
        weights, index = mlp.gate(x).softmax(-1).topk(2)
        for expert in range(3):
            where, place = torch.where(index == expert)
            routed = outputs["model.layers.0.mlp.experts", expert]
            assert torch.equal(routed.tokens, where) and torch.equal(routed.weights, weights[where, place])
            torch.testing.assert_close(routed.outputs, mlp.experts[expert](x[where]) * routed.weights[:, None])


def test_what_cannot_be_followed_is_unknown():
    outputs = observed(with_lists("mixed"), batch_for(with_lists()))[1]
    assert len(outputs) == 6
    assert all(routed.tokens is None and routed.weights is None for routed in outputs.values())
    assert sum(len(routed.outputs) for routed in outputs.values()) == 2 * 2 * 27


def test_shared_experts_get_all_tokens():
    model = build_mixture("inkling_text")
    batch = batch_for(model)
    inputs, outputs, _ = observed(model, batch)
    shared = {routed for (name, _), routed in outputs.items() if "shared" in name}
    assert shared and all(routed.experts.shared and len(routed.outputs) == 27 for routed in shared)
    assert all(len(x) == 27 for (name, _), (x, _) in inputs.items() if "shared" in name)
    collect_statistics(model, [batch_for(model, "right")])


@pytest.mark.parametrize("kind, sizes", [("mixtral", {"num_local_experts": 1}), ("dbrx", {"moe_num_experts": 1})])
def test_a_bank_with_one_expert(kind, sizes):
    top_k = {"moe_top_k": 1} if kind == "dbrx" else {"num_experts_per_tok": 1}
    model = build_mixture(kind, **sizes, **top_k)
    outputs = observed(model, batch_for(model))[1]
    assert len(outputs) == 4 and all(torch.equal(r.tokens.sort()[0], torch.arange(27)) for r in outputs.values())


@pytest.mark.parametrize("kind, name", [("mixtral", "num_experts_per_tok"), ("dbrx", "moe_top_k")])
def test_all_experts_for_each_token(kind, name):
    model = build_mixture(kind, **{name: 4})
    outputs = observed(model, batch_for(model))[1]
    assert len(outputs) == 16 and all(torch.equal(r.tokens.sort()[0], torch.arange(27)) for r in outputs.values())


@pytest.mark.parametrize("family", [*MIXTURES, "jetmoe"])
def test_everything_comes_back_after_an_error(family):
    model = build_mixture(family)
    before = model.config._experts_implementation

    def fail(*arguments):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), observed_experts(find_decoder_layers(model), range(4), fail):
        model(**batch_for(model))
    assert model.config._experts_implementation == before and IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS
    assert not torch._C._len_torch_function_stack()
    assert not any(m._forward_pre_hooks for m in model.modules())


class Bank(nn.Module):
    """With code of its own: `way` says what it multiplies by."""

    def __init__(self, way):
        super().__init__()
        self.num_experts, self.way = 2, way
        self.up = nn.Parameter(torch.randn(2, 32, 32))
        self.down = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x):
        if self.way == "copies":
            return sum(F.linear(F.silu(F.linear(x, W + 0)), V) for W, V in zip(self.up, self.down + 0, strict=True))
        return sum(F.silu(x @ self.up[e]) @ self.down[e] for e in range(2))


@pytest.mark.parametrize(
    "way, message",
    [
        ("copies", r"model: expected experts that multiply tokens by views .*, got Bank \(model.layers.0.mlp\)"),
        ("turned", r"model: expected plain matrices in model.layers.0.mlp.up, judged by .*, got the reverse"),
    ],
)
def test_banks_that_cannot_be_observed_are_refused(way, message):
    model = build("llama", layers=1)
    model.model.layers[0].mlp = Bank(way)
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, [batch_for(model)])
    assert not torch._C._len_torch_function_stack()


def test_experts_without_weights():
    """A router of LongCat-Flash may choose only experts that return their input: no matrix of the bank is used."""
    model, batches = build_type("longcat_flash"), [{"input_ids": torch.arange(3, 19)[None]}]
    banks = [layer.mlp.experts for layer in model.model.layers]
    seen = [0] * len(banks)

    def hook(layer):
        def count(bank, args):
            seen[layer] += int((args[1] < bank.num_routed_experts).sum())

        return count

    handles = [bank.register_forward_pre_hook(hook(layer)) for layer, bank in enumerate(banks)]
    found = collect_statistics(model, batches, layers_path="model.layers")
    for handle in handles:
        handle.remove()
    assert 0 in seen, "a layer without a product"
    for layer, count in enumerate(seen):
        squares = found.squares[f"model.layers.{layer}.mlp.experts.down_proj"]
        assert bool(squares.any()) == bool(count)
    report = prune(model, 0.5, "wanda", batches=batches, layers_path="model.layers")
    assert report.results["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_experts_some_of_which_have_no_weights_are_not_removed():
    model = build_type("longcat_flash")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for path, why in (("model.layers", "a config that counts the layers"), (None, "one module list of 8 layers")):
        with pytest.raises(ValueError, match=f"^model: expected {why}"):
            plan_experts(model, 0.25, batches=[{"input_ids": torch.arange(3, 19)[None]}], layers_path=path)
    stack = replace(find_decoder_layers(model, "model.layers"), config=model.config)
    with pytest.raises(ValueError, match=r"expected experts that all have weights, got 260 in .*, 4 of which have all"):
        mixtures_of(stack)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
