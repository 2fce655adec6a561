"""Removed experts against experts that a router never chooses, merged ones against naive means; what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import (
    DropExpertsSettings,
    ExpertPlan,
    drop_experts,
    find_decoder_layers,
    plan_experts,
    quantize,
    score_experts,
)
from hf_cod.layers.removal.expert_cuts import Cut
from hf_cod.layers.removal.experts import mixtures_of
from tests.compression.experts.references import masked, merged
from tests.layers.test_expert_routing import with_lists
from tests.tiny_models import (
    MIXTURE_TYPES,
    batch_for,
    build,
    build_encoder_decoder,
    build_mixture,
    outputs,
    seq2seq_batch,
    unmapped_outputs,
)

# Field of the config that counts experts, where it is not num_local_experts or num_experts.
COUNTS = {"dbrx": "ffn_config.moe_num_experts", "deepseek_v3": "n_routed_experts", "glm4_moe": "n_routed_experts"}
GROUPED = {"deepseek_v3": {"n_routed_experts": 8, "n_group": 2}, "glm4_moe": {"n_routed_experts": 8, "n_group": 2}}


def mixture(kind, **sizes):
    """With biases of routers, of choices and of banks that are not 0."""
    model = build_mixture(kind, **{**GROUPED.get(kind, {}), **sizes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def names_of(model):
    return [*mixtures_of(find_decoder_layers(model))]


def in_all(names, experts):
    """The same experts in all mixtures."""
    return {name: [*experts] for name in names}


def count_in(config, kind):
    for name in COUNTS.get(kind, "").split(".") if kind in COUNTS else []:
        config = getattr(config, name)
    return config if kind in COUNTS else getattr(config, "num_local_experts", None) or config.num_experts


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", MIXTURE_TYPES)
@torch.no_grad()
def test_removing_is_masking_and_is_saved(kind, tmp_path):
    model = mixture(kind)
    gone = [1, 2, 4, 7] if kind in GROUPED else [1]
    # Other experts in other layers, so that a mixed-up layer is seen.
    moved = [gone, [0, 3, 5, 6]] if kind in GROUPED else [[1], [3], [0]]
    removed = {name: moved[i % len(moved)] for i, name in enumerate(names_of(model))}
    before = outputs(model)
    with masked(model, removed):
        expected = outputs(model)
    assert not torch.allclose(before, expected, atol=1e-3) and torch.equal(outputs(model), before)
    report = drop_experts(model, removed)
    assert torch.allclose(outputs(model), expected, atol=1e-4)
    assert report.results["removed_experts"] == removed and not report.notes
    left = (8 if kind in GROUPED else 4) - len(gone)
    assert count_in(model.config, kind) == left
    assert report.results["parameters"]["dropped"] == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and same(loaded.state_dict(), model.state_dict())
    assert torch.equal(unmapped_outputs(loaded), unmapped_outputs(model))
    tokens = batch_for(model)["input_ids"][:1]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), loaded.generate(tokens, **options))


@pytest.mark.parametrize("kind", MIXTURE_TYPES)
def test_numbers_in_modules_are_those_of_a_reload(kind):
    """Of the experts and around them, and of the load-balancing loss."""
    model = mixture(kind)
    drop_experts(model, in_all(names_of(model), [0, 4] if kind in GROUPED else [0]))
    with torch.device("meta"):
        rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict()))
    others = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        mine, other = ({k: v for k, v in vars(m).items() if type(v) is int} for m in (module, others[name]))
        assert mine == other, name


@pytest.mark.parametrize("method", ["reap", "router_weight", "frequency", "owl"])
def test_the_lowest_scores_go(method):
    model = mixture("qwen3_moe")
    batches = [batch_for(model)]
    scores = score_experts(model, method=method, batches=batches)
    report = drop_experts(model, 0.5, batches=batches, method=method)
    for name, removed in report.results["removed_experts"].items():
        values = scores.values[name]
        assert len(removed) == 2
        assert max(values[e] for e in removed) <= min(values[e] for e in range(4) if e not in removed)
    shares = report.layers["removed_token_share"]
    name = next(iter(scores.tokens))
    gone = report.results["removed_experts"][name]
    assert shares[0] == sum(scores.tokens[name][e] for e in gone) / sum(scores.tokens[name])
    assert report.layers["experts"] == [4] * 4 and report.layers["experts_left"] == [2] * 4
    assert (
        "2 of 4 experts of each mixture are removed" in report.summary[0] and "% of the tokens' " in report.summary[1]
    )


def test_scores_a_plan_and_its_file(tmp_path):
    model, batches = mixture("mixtral"), [batch_for(build("llama"))]
    scores = score_experts(model, method="frequency", batches=batches)
    plan = plan_experts(model, 0.25, scores)
    assert plan == plan_experts(model, 0.25, method="frequency", batches=batches) and plan.n_removed == 1
    plan.save(tmp_path / "expert_plan.json")
    assert ExpertPlan.load(tmp_path / "expert_plan.json") == plan
    other = copy.deepcopy(model)
    drop_experts(model, plan)
    drop_experts(other, 0.25, scores)
    assert same(model.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match=r"plan: expected 3 experts in .*, got 4 in"):
        drop_experts(model, plan)


def test_layers_without_experts_stay():
    model = mixture("deepseek_v3")
    dense = state(model.model.layers[0])
    shared = state(model.model.layers[1].mlp.shared_experts)
    report = drop_experts(model, 0.5, batches=[batch_for(model)])
    assert report.layers["experts"] == [0, 8, 8, 8] and report.layers["experts_left"] == [0, 4, 4, 4]
    assert report.layers["removed_token_share"][0] == 0
    assert same(dense, model.model.layers[0].state_dict())
    assert same(shared, model.model.layers[1].mlp.shared_experts.state_dict())
    for removed in report.results["removed_experts"].values():
        assert sum(e < 4 for e in removed) == 2, "equally many in each group"


def test_groups_round_the_share():
    model = build_mixture("deepseek_v3", n_routed_experts=12, n_group=2)
    batches = [batch_for(model)]
    numbers = {share: plan_experts(model, share, batches=batches).n_removed for share in (0.1, 0.2, 0.25, 0.3, 0.65)}
    assert numbers == {0.1: 2, 0.2: 2, 0.25: 4, 0.3: 4, 0.65: 8}
    with pytest.raises(ValueError, match=r"share: expected at least 0.167, which removes 2 of 12 experts, got 0.05"):
        plan_experts(model, 0.05, batches=batches)
    with pytest.raises(ValueError, match=r"experts: expected a multiple of 2 experts .* at least 4.*, got 2"):
        plan_experts(model, 0.8, batches=batches)
    name = names_of(model)[0]
    with pytest.raises(ValueError, match=r"experts: expected equally many .* in each of 2 groups of .*, got \[4, 6\]"):
        drop_experts(model, {**in_all(names_of(model), [0, 6]), name: [0, 1]})


def test_a_share_of_nothing():
    model = mixture("gpt_oss")
    before, config = state(model), model.config.to_dict()
    report = drop_experts(model, 0.0, batches=[batch_for(model)])
    assert same(before, model.state_dict()) and model.config.to_dict() == config
    assert not any(report.results["removed_experts"].values())
    assert report.results["parameters"]["intact"] == report.results["parameters"]["dropped"]


@pytest.mark.parametrize("kind, field", [("mixtral", "num_experts_per_tok"), ("gpt_oss", "num_experts_per_tok")])
@torch.no_grad()
def test_one_expert_is_left(kind, field, tmp_path):
    """It gets all tokens, whatever their weights were."""
    model = mixture(kind)
    removed = in_all(names_of(model), [0, 1, 3])
    with masked(model, removed):
        expected = outputs(model)
    report = drop_experts(model, removed)
    assert report.notes == [f"{field} was 2 and is now 1: a token reaches no more experts"]
    assert getattr(model.config, field) == 1 == mixtures_of(find_decoder_layers(model))[names_of(model)[0]].top_k
    assert torch.allclose(outputs(model), expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.allclose(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model), atol=1e-5)


def test_tokens_reach_no_more_experts_than_the_chosen_groups_have():
    model = build_mixture("deepseek_v3", n_routed_experts=12, n_group=2, topk_group=1, num_experts_per_tok=4)
    report = drop_experts(model, 0.5, batches=[batch_for(model)])
    assert report.notes == ["num_experts_per_tok was 4 and is now 3: a token reaches no more experts"]
    assert model.config.num_experts_per_tok == 3 and outputs(model).isfinite().all()


def flat(model, name, expert, biases=False):
    """All weights of one expert, from the parameters of banks by name."""
    found = []
    for matrix in mixtures_of(find_decoder_layers(model))[name].matrices:
        found.append(matrix.read(expert).detach().flatten())
        if biases and matrix.bias is not None:
            found.append(matrix.bias[expert].detach().flatten())
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "jetmoe", "deepseek_v3"])
def test_merging_against_naive_code(kind):
    model = mixture(kind)
    batches, intact = [batch_for(model)], copy.deepcopy(model)
    tokens = score_experts(model, method="frequency", batches=batches).tokens
    plan = plan_experts(model, 0.5, batches=batches)
    report = drop_experts(model, plan, merge=True)
    for name, kept in plan.kept.items():
        weights = [flat(intact, name, e) for e in range(plan.count)]
        expected = merged(weights, kept, tokens[name])
        for i, wanted in enumerate(expected):
            assert torch.allclose(flat(model, name, i).double(), wanted, atol=1e-5)
        assert [*map(int, report.results["merged_experts"][name])] == plan.removed[name]
        router, whole = (mixtures_of(find_decoder_layers(m))[name].router for m in (model, intact))
        rows = getattr(whole.module, whole.key)[kept]
        assert torch.equal(getattr(router.module, router.key), rows), "rows of the kept experts are not changed"
    assert "are merged into the most similar kept ones" in report.summary[0]


@torch.no_grad()
def test_biases_are_merged_like_weights():
    """Of two experts with equal matrices, the biases of which differ."""
    model = mixture("gpt_oss")
    bank = model.model.layers[0].mlp.experts
    for weight in (bank.gate_up_proj, bank.down_proj):
        weight[3] = weight[1]
    biases = bank.down_proj_bias.clone()
    tokens = {name: [5, 30, 7, 10] for name in names_of(model)}
    scores = replace(score_experts(model, method="frequency", batches=[batch_for(model)]), tokens=tokens)
    matrix = bank.down_proj[1].clone()
    report = drop_experts(model, in_all(names_of(model), [3]), scores, merge=True)
    bank = model.model.layers[0].mlp.experts
    assert report.results["merged_experts"]["model.layers.0.mlp.experts"] == {"3": 1}
    assert torch.allclose(bank.down_proj_bias[1], biases[1] * 0.75 + biases[3] * 0.25)
    assert torch.allclose(bank.down_proj[1], matrix) and torch.equal(bank.down_proj_bias[0], biases[0])


@torch.no_grad()
def test_one_of_two_twins_is_merged_into_the_other():
    """With equal rows of the router and one expert for each token, the other one takes all of its tokens."""
    model = build_mixture("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
            weight[3] = weight[1]
    before = outputs(model)
    scores = score_experts(model, method="frequency", batches=[batch_for(model)])
    report = drop_experts(model, in_all(names_of(model), [3]), scores, merge=True)
    assert [*report.results["merged_experts"].values()] == [{"3": 1}] * 4
    assert torch.allclose(outputs(model), before, atol=1e-5)


def test_experts_without_a_token_weigh_nothing():
    model = mixture("mixtral")
    before = state(model)
    scores = score_experts(model, method="frequency", batches=[batch_for(model)])
    unused = replace(scores, tokens={name: [9, 9, 9, 0] for name in scores.tokens})
    drop_experts(model, in_all(names_of(model), [3]), unused, merge=True)
    name = "model.layers.2.mlp.experts.down_proj"
    assert torch.equal(model.state_dict()[name], before[name][:3])


def untouched(model, message, *arguments, **options):
    """The call fails with this message, and changes nothing."""
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    config, numbers = model.config.to_dict(), numbers_of(model)
    with pytest.raises(ValueError, match=message) as raised:
        drop_experts(model, *arguments, **options)
    assert "\n" not in str(raised.value)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and model.config.to_dict() == config and numbers_of(model) == numbers
    assert all(after[name] is tensor and torch.equal(tensor, copied) for name, (tensor, copied) in before.items())


def numbers_of(model):
    return {name: {k: v for k, v in vars(m).items() if type(v) is int} for name, m in model.named_modules()}


def test_what_is_refused():
    model, batches = build_mixture("mixtral"), [batch_for(build("llama"))]
    names = names_of(model)
    untouched(build("llama"), "model: expected a mixture of experts, got LlamaForCausalLM", 0.5, batches=batches)
    untouched(model, "share: expected a share of the experts of at least 0 and below 1, got 1", 1.0, batches=batches)
    untouched(model, "share: expected at least 0.25, which removes 1 of 4 experts, got 0.1", 0.1, batches=batches)
    untouched(model, "experts: expected at least one expert to be left", 0.9, batches=batches)
    one = build_mixture("mixtral", num_local_experts=1, num_experts_per_tok=1)
    untouched(one, "model: expected more than 1 expert in each mixture, to remove some, got 1$", 0.5, batches=batches)
    untouched(model, "batches: expected batches, or tokenizer and texts, for the method reap", 0.5)
    untouched(model, "batches: .* for merge, which weights experts by usage", in_all(names, [1]), merge=True)
    untouched(model, "removed: expected equally many experts in all layers", {**in_all(names, [1]), names[0]: []})
    untouched(model, "removed: expected experts from 0 to 3 in ascending", in_all(names, [4]))
    untouched(model, "plan: expected experts of model.layers.0.mlp.experts", {names[0]: [1]})
    untouched(model, "threshold: expected none with method reap", 0.5, batches=batches, threshold=3.0)
    chosen = DropExpertsSettings(method="frequency")
    untouched(model, "method: expected none with a plan", in_all(names, [1]), settings=chosen)
    scores = score_experts(build_mixture("mixtral", num_local_experts=3), batches=batches)
    untouched(model, "expert_scores: expected 4 experts", 0.5, scores)


def test_what_no_config_can_say():
    untouched(with_lists(), "model: expected a config of LlamaForCausalLM that counts its 3 experts", 0.34, batches=[])
    model = build_mixture("mixtral")
    model.model.layers[1] = build_mixture("mixtral", num_local_experts=3).model.layers[1]
    untouched(model, "model: expected equally many experts in all layers", 0.5, batches=[])
    model = build_mixture("mixtral")
    model.model.layers[1].mlp.register_parameter("of_each", nn.Parameter(torch.zeros(4)))
    untouched(model, "experts: expected kept experts that the config of Mixtral", 0.5, batches=[])


@pytest.mark.parametrize("kind", ["nllb-moe", "switch_transformers"])
@pytest.mark.parametrize("side, other", [("encoder", "decoder"), ("decoder", "encoder")])
def test_experts_of_both_sides_are_counted_once(kind, side, other):
    model = build_encoder_decoder(kind)
    message = f"model: expected experts in {side} alone, as the config of .* counts .* once, got some in {other}"
    untouched(model, message, 0.25, batches=[seq2seq_batch(model)], layers_path=side)


def test_a_table_of_experts_by_token_is_refused():
    """Its numbers would be those of other experts."""
    model = build_mixture("deepseek_v4")
    message = "model: expected routers that choose experts by scores alone, got whole numbers in .*tid2eid"
    untouched(model, message, 0.25, batches=[batch_for(model)])


def test_weights_that_cannot_be_cut():
    tied = build_mixture("mixtral")
    tied.model.layers[1].mlp.experts.down_proj = tied.model.layers[0].mlp.experts.down_proj
    untouched(tied, "model: expected a separate weight for each matrix", 0.5, batches=[batch_for(tied)])
    with torch.device("meta"):
        empty = build_mixture("mixtral")
    with pytest.raises(ValueError, match="model: expected weights in memory"):
        drop_experts(empty, in_all(names_of(empty), [1]))
    four = build_mixture("mixtral", hidden_size=64, intermediate_size=64)
    quantize(four, bits=4, block=32)
    with pytest.raises(ValueError, match="quant"):
        drop_experts(four, in_all(names_of(four), [1]))


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model = build_mixture("gpt_oss")
    made = []

    cut = Cut.apply

    def interrupted(self, *arguments):
        made.append(1)
        if len(made) == 9:
            raise KeyboardInterrupt
        cut(self, *arguments)

    before, config = {n: t for n, t in model.state_dict(keep_vars=True).items()}, model.config.to_dict()
    removed = in_all(names_of(model), [1])
    monkeypatch.setattr(Cut, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drop_experts(model, removed)
    assert len(made) == 9 and model.config.to_dict() == config
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())


def test_a_model_keeps_its_dtype_and_the_config_of_others():
    model = build_mixture("qwen2_moe").to(torch.bfloat16)
    other = type(model)(model.config)
    drop_experts(model, 0.5, batches=[batch_for(model)])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and other.config.num_experts == 4
    assert all(p.requires_grad for p in model.parameters())
