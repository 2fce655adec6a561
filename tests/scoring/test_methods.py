import math
from typing import get_type_hints

import peft
import pytest
import torch
from accelerate import disk_offload
from torch import nn

from hf_cod import LayerScores, allocate, collect_statistics, find_decoder_layers, score_layers
from hf_cod.analysis.diagnostics.gradients import measure_gradient_norm
from hf_cod.analysis.statistics.output_gradients import measure_loss_weights
from hf_cod.scoring.methods import METHODS
from hf_cod.scoring.settings import METHODS as ROWS
from hf_cod.scoring.settings import ScoreFields, ScoreSettings
from tests import references
from tests.tiny_models import batch_for, build


@pytest.mark.parametrize("M", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt", "gpt2", "bert"])
def test_owl_against_whole_matrices(family, M):
    model = build(family)
    batches = [batch_for(model, "right")]
    found = score_layers(model, collect_statistics(model, batches), threshold=M)
    for index, value in enumerate(found.values):
        matrices = list(references.linear_inputs(model, batches, index).values())
        assert value == pytest.approx(references.outlier_ratio(matrices, M), abs=1e-6)
        assert found.parameters[index] == sum(W.numel() for W, _ in matrices)


def test_owl_of_a_mixture_counts_each_expert_with_its_own_tokens():
    model = build("mixtral", layers=1, num_local_experts=12, num_experts_per_tok=1)
    batches = [batch_for(model)]
    statistics = collect_statistics(model, batches)
    matrices = [(W, X) for W, X in references.linear_inputs(model, batches, 0).values()]
    bank = model.model.layers[0].mlp.experts
    for key in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{key}"
        seen = statistics.tokens[name].nonzero().flatten().tolist()
        assert 0 < len(seen) < 12
        matrices += [(getattr(bank, key)[e], statistics.squares[name][e].sqrt()[None]) for e in seen]
    assert score_layers(model, statistics).values[0] == pytest.approx(references.outlier_ratio(matrices, 5), abs=1e-6)


def test_transposed_banks_of_experts_are_turned():
    model = build("gpt_oss", layers=1)
    stack = find_decoder_layers(model)
    shapes = stack.input_shapes(0)
    for name, W in stack.matrices(0):
        assert (*W.shape[:-2], W.shape[-1]) == shapes[name]
    assert stack.count_weights(0) == sum(W.numel() for _, W in stack.matrices(0))
    assert score_layers(model, batches=[batch_for(model)]).values[0] > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_one_finite_number_a_layer(method):
    for layers in (1, 4):
        model = build("llama", layers=layers)
        scores = score_layers(model, method=method, batches=[batch_for(model, "left")])
        assert len(scores.values) == layers and all(math.isfinite(value) for value in scores.values)
        assert scores.method == method


def test_methods_are_what_they_say():
    model = build("llama")
    batches = [batch_for(model, "right")]
    states, mask = references.hidden_states(model, batches[0]), batches[0]["attention_mask"]

    def of(method, **settings):
        return score_layers(model, method=method, batches=batches, **settings).values

    matrix = references.angular_matrix(states, mask, "last")
    assert of("angular") == pytest.approx([row[0] for row in matrix.tolist()], abs=1e-6)
    assert of("block_influence") == pytest.approx(references.block_influence(states, mask), abs=1e-5)
    assert of("gradient_norm") == measure_gradient_norm(model, batches)
    stack = find_decoder_layers(model)
    costs = measure_loss_weights(stack, batches)
    sums = [sum(costs[name] for name in stack.linears(index)) for index in range(len(stack))]
    assert of("fisher") == pytest.approx([math.log(cost) for cost in sums], rel=1e-9)
    intact = references.perplexity(model, batches[0])
    without = [references.perplexity(references.without_layer(model, i), batches[0]) for i in range(4)]
    assert of("layer_drop") == pytest.approx([math.log(value / intact) for value in without], abs=1e-4)
    for index, value in enumerate(of("weight_norm")):
        weights = [m.weight.detach().abs().flatten() for m in find_decoder_layers(model).linears(index).values()]
        assert value == pytest.approx(float(torch.cat(weights).double().mean()), rel=1e-6)
    assert of("uniform") == [1, 1, 1, 1]
    assert of("random", seed=1) == of("random", seed=1) != of("random", seed=2)


def test_layer_drop_of_a_model_without_a_head():
    model = build("bert_headless")
    assert min(score_layers(model, method="layer_drop", batches=[batch_for(model)]).values) > 0


def test_per_module_and_bfloat16():
    model = build("llama", dtype=torch.bfloat16)
    batches = [batch_for(model)]
    statistics = collect_statistics(model, batches)
    matrices = list(references.linear_inputs(model, batches, 2).values())
    whole = score_layers(model, statistics, threshold=3)
    own = score_layers(model, statistics, threshold=3, per_module=True)
    assert whole.values[2] == pytest.approx(references.outlier_ratio(matrices, 3), abs=1e-6)
    sizes = [W.numel() for W, _ in matrices]
    each = [n * references.outlier_ratio([pair], 3) for n, pair in zip(sizes, matrices, strict=True)]
    assert own.values[2] == pytest.approx(sum(each) / sum(sizes), abs=1e-6)
    assert own.settings == {"threshold": 3, "per_module": True}


class EightBit(nn.Module):
    """A Linear as a quantizer might store it: codes and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().char(), requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_quantized_weights_are_read_through_their_forward(family):
    quantized, decoded = build(family), build(family)
    for model in (quantized, decoded):
        for index in range(4):
            for name, module in find_decoder_layers(model).linears(index).items():
                codes = EightBit(module)
                if model is quantized:
                    model.set_submodule(name, codes)
                else:
                    module.weight.data = codes.weight * codes.scale.detach()
    batches = [batch_for(quantized)]
    for (name, found), (_, expected) in zip(
        find_decoder_layers(quantized).matrices(1), find_decoder_layers(decoded).matrices(1), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=name)
    first, second = score_layers(quantized, batches=batches), score_layers(decoded, batches=batches)
    assert first.values == pytest.approx(second.values, abs=3e-4) and first.parameters == second.parameters


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_offloaded_and_wrapped_models(family, tmp_path):
    batches = [batch_for(build(family))]
    expected = score_layers(build(family), batches=batches)
    offloaded = build(family)
    disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    assert score_layers(offloaded, batches=batches).values == pytest.approx(expected.values, abs=1e-9)
    assert all(p.device.type == "meta" for p in find_decoder_layers(offloaded)[0].parameters())
    if family == "llama":
        wrapped = peft.get_peft_model(build(family), peft.LoraConfig(target_modules="all-linear"))
        assert score_layers(wrapped, batches=batches) == expected


def test_save_and_load(tmp_path):
    model = build("llama")
    scores = score_layers(model, method="random", seed=3)
    assert LayerScores.load(scores.save(tmp_path / "scores.json")) == scores
    (tmp_path / "old.json").write_text('{"format": 0}')
    (tmp_path / "list.json").write_text("[1]")
    allocate(scores).save(tmp_path / "plan.json")
    for name, message in [
        ("plan", "expected model, method, .*, got 'kind'"),
        ("old", "format 1, got 0"),
        ("list", "expected named entries"),
        ("none", "expected a file"),
    ]:
        with pytest.raises(ValueError, match=f"scores: .*{message}"):
            LayerScores.load(tmp_path / f"{name}.json")


def test_the_help_describes_every_method():
    text = ScoreSettings.__dataclass_fields__["method"].metadata["help"]
    assert all(f"{name}: {row.description}" in text for name, row in ROWS.items())


def test_each_setting_belongs_to_a_method_and_can_be_passed_by_name():
    of_methods = {name for row in ROWS.values() for name in row.settings}
    assert {*ScoreSettings.__dataclass_fields__} == of_methods | {"method", "layers_path"}
    assert of_methods <= {*get_type_hints(ScoreFields)}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_needs_what_its_row_says(method):
    row, model = ROWS[method], build("llama")
    batches = [batch_for(model)]
    with torch.device("meta"):
        without_weights = build("llama")
    statistics = collect_statistics(model, batches) if row.uses_statistics else None
    needed = score_layers(model, statistics, method, batches=batches if row.needs_batches else None)
    assert needed == score_layers(model, method=method, batches=batches)
    assert {*row.settings} - {"granularity"} <= {*needed.settings}
    if row.needs_batches or row.uses_statistics:
        with pytest.raises(ValueError, match=r"^(batches|statistics): expected .*batches, or tokenizer"):
            score_layers(model, method=method)
    if row.needs_weights:
        with pytest.raises(ValueError, match="got a model on the meta device"):
            score_layers(without_weights, statistics, method, batches=batches)
    else:
        assert score_layers(without_weights, method=method).values == needed.values


@pytest.mark.parametrize(
    "method, given",
    [
        ("angular", {"threshold": 3}),
        ("angular", {"pruner": "magnitude"}),
        ("sensitivity", {"per_module": True}),
        ("owl", {"target": 0.3}),
        ("owl", {"seed": 5}),
    ],
)
def test_settings_of_another_method_are_refused(method, given):
    model, (name,) = build("llama"), given
    batches = [batch_for(model)]
    with pytest.raises(ValueError, match=rf"{name}: expected none with method {method}, which does not use it, got"):
        score_layers(model, method=method, batches=batches, **given)
    default = {name: getattr(ScoreSettings(), name)}
    assert score_layers(model, method=method, batches=batches, **default).method == method
    shared = ScoreSettings(**given)  # settings that serve several methods
    assert score_layers(model, method=method, batches=batches, settings=shared).method == method


def test_bad_input():
    model = build("llama")
    batches = [batch_for(model)]
    with pytest.raises(ValueError, match=r"method: expected one of owl, angular, .*got 'best'"):
        score_layers(model, method="best")
    with pytest.raises(
        ValueError, match="statistics: expected statistics, batches, or tokenizer and texts for owl, got none"
    ):
        score_layers(model)
    with pytest.raises(ValueError, match="batches: expected batches, or tokenizer and texts, for the method angular"):
        score_layers(model, method="angular")
    for texts in (["one two"], "one two"):
        with pytest.raises(ValueError, match=r"batches: expected .*token_batches\(tokenizer, texts\)"):
            score_layers(model, batches=texts)
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold: expected a finite number above 0"):
            score_layers(model, batches=batches, threshold=wrong)
    with pytest.raises(ValueError, match="statistics: expected those of BertForMaskedLM"):
        score_layers(build("bert"), collect_statistics(model, batches))
    statistics = collect_statistics(model, batches)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = math.inf
    for method in (name for name, row in ROWS.items() if row.needs_weights):
        for given in (statistics, None):
            with pytest.raises(ValueError, match=r"weights: expected finite .* in model.layers.2.mlp.up_proj"):
                score_layers(model, given, method, batches=batches)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    for method in ("auto", "sensitivity", "layer_drop", "gradient_norm", "fisher"):
        with pytest.raises(ValueError, match=r"weights: expected finite numbers, got NaN or infinity in lm_head"):
            score_layers(model, method=method, batches=batches)
    with pytest.raises(ValueError, match="values: expected finite scores, got nan in layer 1"):
        LayerScores("m", "owl", [1.0, math.nan], [1, 1])
    with pytest.raises(ValueError, match="values: expected one per layer"):
        LayerScores("m", "owl", [1.0], [1, 1])
