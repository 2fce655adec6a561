import copy
import math

import pytest
import torch

from hf_cod import DepthPlan, drop_layers, find_decoder_layers, plan_depth
from hf_cod.analysis.diagnostics.layer_drop import measure_layer_drop
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.compression.depth.criteria import CRITERIA
from hf_cod.compression.depth.maps import Maps
from hf_cod.compression.depth.protection import JUMP
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.io.journal import Journal
from tests import references
from tests.compression.depth.references import best_removal, loss_without
from tests.forged import forge, with_first_number
from tests.tiny_models import CAUSAL, batch_for, build


def batches_of(model, count=3):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 99, (2, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3", "olmo2"])
def test_single_drops_against_the_whole_model(family):
    model = build(family)
    batches = batches_of(model)
    plan = plan_depth(model, 2, "layer_drop", batches=batches, protect=False)
    intact = loss_without(model, [], batches)
    expected = [loss_without(model, [i], batches) - intact for i in range(4)]
    assert plan.costs == pytest.approx(expected, abs=1e-5)
    assert plan.layers == sorted(sorted(range(4), key=lambda i: expected[i])[:2]) and plan.kept == [
        i for i in range(4) if i not in plan.layers
    ]


def test_removals_together_are_those_alone():
    """Hidden states are shared between removals, and a removal in the journal leaves its place to the others."""
    model = build("llama", layers=5)
    batches = batches_of(model, 2)
    metric = find_metric(None, "causal_lm")
    removals = [(), (0,), (4,), (0, 1, 2, 3), (1, 3), (1, 2, 4), (1, 3)]
    probe = RemovalProbe(find_decoder_layers(model), metric, batches)
    expected = [loss_without(model, removed, batches) for removed in removals]
    assert probe.losses(removals[3:5]) == pytest.approx(expected[3:5], abs=1e-5)
    assert probe.losses(removals) == pytest.approx(expected, abs=1e-5)
    _, without = measure_layer_drop(model, batches, metric)
    assert probe.losses([(4,)])[0] == pytest.approx(math.log(without[4]), abs=1e-6)


def test_block_influence_and_angular_against_the_formulas():
    model = build("llama", layers=6)
    batch = batch_for(model, "right")
    states = references.hidden_states(model, batch)
    influence = references.block_influence(states, batch["attention_mask"])
    found = plan_depth(model, 3, "block_influence", batches=[batch], protect=False)
    assert found.costs == pytest.approx(influence, abs=1e-5)
    assert found.layers == sorted(sorted(range(6), key=lambda i: influence[i])[:3])
    angles = references.angular_matrix(states, batch["attention_mask"], "last")[:, 2]
    found = plan_depth(model, 3, "angular", batches=[batch], protect=False)
    start = min(range(4), key=lambda i: angles[i])
    assert found.layers == [start, start + 1, start + 2]
    assert found.costs[:4] == pytest.approx(angles[:4].tolist(), abs=1e-6) and found.costs[4:] == [None, None]


def test_the_search_finds_the_best_removal_of_all():
    """15 pairs of 6 layers, width enough to try every exchange: a minimum that no exchange leaves, here the least."""
    model = build("llama", layers=6)
    batches = batches_of(model)
    plan = plan_depth(model, 2, "search", batches=batches, protect=False)
    best, losses = best_removal(model, 2, range(6), batches[:2])
    told = plan.candidates
    assert told["exchanges"]["layers"] == best
    assert losses[tuple(best)] <= losses[tuple(told["greedy"]["layers"])]
    unseen = {name: loss_without(model, found["layers"], batches[2:]) for name, found in told.items()}
    assert {name: found["loss"] for name, found in told.items()} == pytest.approx(unseen, abs=1e-5)
    chosen = min((n for n in told if n != "intact"), key=unseen.get)
    assert plan.layers == told[chosen]["layers"] and plan.criterion == "search"


@pytest.mark.parametrize("replacement", ["linear", "measured"])
def test_candidates_are_compared_with_the_maps_that_will_replace_them(replacement, tmp_path):
    """Fitted to what the search saw, measured on what it did not; the model stays."""
    model = build("llama", layers=6)
    batches = batches_of(model)
    before = copy.deepcopy(model.state_dict())
    options = {"batches": batches, "protect": False, "replacement": replacement, "journal": tmp_path}
    plan = plan_depth(model, 2, "search", **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plan.replacement == replacement
    losses = {}
    for name, found in plan.candidates.items():
        plain = losses[name] = loss_without(model, found["layers"], batches[2:])
        if found["layers"]:
            shorter, maps = copy.deepcopy(model), Maps()
            measuring = batches[2:] if replacement == "measured" else None
            maps.put(find_decoder_layers(shorter), found["layers"], batches[:2], measuring)
            losses[name] = loss_without(shorter, found["layers"], batches[2:])
            used = sum(entry["used"] for entry in maps.replacements)
            assert found["maps"] == used and (abs(losses[name] - plain) > 1e-4) == bool(used)
            assert used == len(maps.replacements) or replacement == "measured"
    assert {name: found["loss"] for name, found in plan.candidates.items()} == pytest.approx(losses, abs=1e-5)
    assert plan.layers == plan.candidates[min((n for n in losses if n != "intact"), key=losses.get)]["layers"]
    rows = (tmp_path / "journal.jsonl").read_text()
    assert plan_depth(model, 2, "search", **options) == plan and (tmp_path / "journal.jsonl").read_text() == rows
    report = drop_layers(copy.deepcopy(model), plan, batches=batches)
    assert report.settings["replacement"] == replacement and not report.notes
    chosen = " and ".join(plan.chosen).replace("_", " ")
    assert chosen and f"(best of its candidates: {chosen});" in report.summary[0]
    how = ", with maps" if any(found["maps"] for found in plan.candidates.values()) else ""
    assert f"Loss on samples that the search did not use{how}: " in " ".join(report.summary)
    assert "compared its candidates with" in drop_layers(copy.deepcopy(model), plan, "none").notes[0]
    with pytest.raises(
        ValueError,
        match=f"batches: expected batches, or tokenizer and texts, for replacement {replacement}, got neither",
    ):
        drop_layers(model, plan)
    with pytest.raises(ValueError, match="replacement: expected one of none, linear, measured, got 'maps'"):
        plan_depth(model, 2, "search", batches=batches, replacement="maps")


@pytest.mark.parametrize("only", ["without", "["])
@pytest.mark.parametrize(
    "number", [1e30, -5.0, *(pytest.param(number, marks=pytest.mark.slow) for number in (math.nan, "x", True, None))]
)
def test_results_in_a_journal_that_cannot_be_losses_are_measured_again(number, only, tmp_path, caplog):
    """Rows of removals, and losses with maps."""
    model = build("llama")
    options = {"batches": batches_of(model), "protect": False, "replacement": "linear", "journal": tmp_path}
    plan = plan_depth(model, 1, **options)
    forge(tmp_path / "journal.jsonl", lambda value: with_first_number(value, number), only)
    assert plan_depth(model, 1, **options) == plan
    assert "has a damaged result" in caplog.text


def test_rows_of_other_numbers_of_tokens_are_measured_again(tmp_path, caplog):
    model = build("llama")
    options = {"batches": batches_of(model), "protect": False, "journal": tmp_path}
    plan = plan_depth(model, 1, **options)
    forge(tmp_path / "journal.jsonl", lambda rows: [[loss, 1000] for loss, _ in rows])
    assert plan_depth(model, 1, **options) == plan and "has a damaged result" in caplog.text


@pytest.mark.parametrize("where", ["of the intact model", "without layers 2"])
def test_a_loss_beyond_the_range_of_perplexities_is_refused(where, monkeypatch):
    model, rows = build("llama"), RemovalProbe._rows
    wanted = () if where == "of the intact model" else (2,)

    def beyond(self, batch, removed):
        return [[1e6, 1.0]] if removed == wanted else rows(self, batch, removed)

    monkeypatch.setattr(RemovalProbe, "_rows", beyond)
    with pytest.raises(ValueError, match=rf"^model: expected a finite loss, got inf {where}$"):
        plan_depth(model, 1, "layer_drop", batches=batches_of(model, 1), protect=False)


def test_an_interrupted_comparison_takes_maps_back_and_goes_on(tmp_path, monkeypatch):
    model = build("llama", layers=6)
    before = copy.deepcopy(model.state_dict())
    options = {"batches": batches_of(model), "protect": False, "replacement": "linear"}
    expected = plan_depth(model, 2, "search", **options)
    put, done = Maps.put, []

    def dies(self, *arguments):
        put(self, *arguments)
        done.append(arguments)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Maps, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        plan_depth(model, 2, "search", **options, journal=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plan_depth(model, 2, "search", **options, journal=tmp_path) == expected
    different = {str(found["layers"]) for found in expected.candidates.values() if found["layers"]}
    assert len(done) == len(different) + 1, "only what was interrupted is measured again"


def massive(layer, layers=5):
    """A model in which one layer adds entries that are hundreds of times those that it reads."""
    model = build("llama", layers=layers)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "down_proj"):
                module.down_proj.weight *= 0.1
        model.model.layers[layer].mlp.down_proj.weight[3] *= 1e4
        model.model.embed_tokens.weight *= 5
    return model


@pytest.mark.parametrize("method", CRITERIA)
def test_a_layer_where_massive_activations_arise_stays(method):
    model = massive(2)
    batches = batches_of(model)
    states = [state.abs().max() for state in references.hidden_states(model, batches[0])]
    assert states[3] > JUMP * states[2] and all(states[i + 1] < JUMP * states[i] for i in (0, 1, 3, 4))
    plan = plan_depth(model, 2, method, batches=batches)
    assert plan.protected == [2] and 2 not in plan.layers
    free = plan_depth(model, 2, method, batches=batches, protect=False)
    assert free.protected == [] and free.protection == ""
    named = plan_depth(model, 2, method, batches=batches, protect=[0])
    assert 0 not in named.layers
    for found, told in (
        (plan, "Layer 2 was protected: massive activations arise there."),
        (free, None),
        (named, "Layer 0 was protected, as given."),
    ):
        summary = drop_layers(copy.deepcopy(model), found).summary
        assert [line for line in summary if "protected" in line] == ([] if told is None else [told])


def test_protection_that_leaves_too_few_says_so():
    model = massive(2)
    batches = batches_of(model)
    message = (
        r"n_removed: expected at most 1 of 5 layers without the protected ones \(0, 1, 2, 3\), got 2; protect=False"
    )
    with pytest.raises(ValueError, match=message):
        plan_depth(model, 2, "search", batches=batches, protect=range(4))
    with pytest.raises(ValueError, match="n_removed: expected at most the longest run of unprotected layers, got 3"):
        plan_depth(model, 3, "angular", batches=batches)


@pytest.mark.parametrize("stop", [0, 7, 20])
def test_a_killed_search_goes_on_and_decides_the_same(stop, tmp_path, monkeypatch):
    model = build("llama", layers=6)
    batches = batches_of(model)
    expected = plan_depth(model, 2, batches=batches, search_width=3)
    add, done = Journal.add, []

    def dies(self, key, value):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(key)
        add(self, key, value)

    monkeypatch.setattr(Journal, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        plan_depth(model, 2, batches=batches, search_width=3, journal=tmp_path)
    anew = []
    monkeypatch.setattr(Journal, "add", lambda self, key, value: (anew.append(key), add(self, key, value)))
    assert plan_depth(model, 2, batches=batches, search_width=3, journal=tmp_path) == expected
    kept = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(anew) == len(kept) - stop, "what was measured before is not measured again"
    monkeypatch.setattr(Journal, "add", lambda *arguments: pytest.fail("measured again"))
    assert plan_depth(model, 2, batches=batches, search_width=3, journal=tmp_path) == expected


def test_a_journal_of_another_model_is_not_taken(tmp_path):
    model = build("llama")
    batches = batches_of(model)
    plan_depth(model, 1, "layer_drop", batches=batches, journal=tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3
    again = plan_depth(model, 1, "layer_drop", batches=batches, journal=tmp_path)
    assert again == plan_depth(model, 1, "layer_drop", batches=batches)


def test_a_plan_is_written_and_read_and_knows_its_model(tmp_path):
    model = build("llama")
    plan = plan_depth(model, 1, batches=batches_of(model))
    assert DepthPlan.load(plan.save(tmp_path / "plan.json")) == plan
    with pytest.raises(ValueError, match="plan: expected those of a model with 3 layers, got 4"):
        drop_layers(build("llama", layers=3), plan)


@pytest.mark.parametrize("family", CAUSAL)
def test_models_come_back_untouched(family):
    model = build(family).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = model.config.to_dict()
    plan_depth(model, 1, batches=batches_of(model), protect=False, search_width=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.to_dict() == config and all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "bert_headless", "vit"])
def test_models_without_an_lm_head_by_the_angle_of_their_output(family):
    """Masked words have no labels here, and neither do images."""
    model = build(family)
    batch = batch_for(model)
    batches = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
    plan = plan_depth(model, 1, "search", batches=batches, protect=False)
    assert 0 <= plan.candidates["intact"]["loss"] < 1e-6
    assert all(0 < cost < 1 for cost in plan.costs) and len(plan.layers) == 1
    assert any(line.startswith("Output angle on samples") for line in drop_layers(model, plan).summary)


def test_bad_input():
    model = build("llama")
    batches = batches_of(model)
    for count in (0, 4, 5, -1):
        with pytest.raises(ValueError, match=r"n_removed: expected 1..3 of 4 layers to remove, got"):
            plan_depth(model, count, batches=batches)
    with pytest.raises(ValueError, match="n_removed: expected an integer, got"):
        plan_depth(model, 1.5, batches=batches)
    with pytest.raises(ValueError, match=f"criterion: expected one of {', '.join(CRITERIA)}, got 'x'"):
        plan_depth(model, 1, "x", batches=batches)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        plan_depth(model, 1, batches=[])
    one = [{name: tensor[:1] for name, tensor in batches[0].items()}]
    with pytest.raises(ValueError, match="batches: expected at least two samples, one for the search"):
        plan_depth(model, 1, batches=one)
    with pytest.raises(ValueError, match="protect: expected True, False or indices from 0 to 3, got"):
        plan_depth(model, 1, batches=batches, protect=[7])
    flagged = [{**batch, "use_cache": False} for batch in batches]
    given = [plan_depth(model, 1, batches=flagged, protect=protect) for protect in (3, [3])]
    assert given[0] == given[1] and given[0].protected == [3]
    with pytest.raises(ValueError, match="search_width: expected at least 1, got 0"):
        plan_depth(model, 1, batches=batches, search_width=0)
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="layers: expected layers with their own keys and values"):
        plan_depth(model, 1, batches=batches)


def test_a_plan_that_the_config_cannot_describe_is_refused():
    model = build("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[])
    with pytest.raises(ValueError, match="layers: expected kept layers that the config of"):
        plan_depth(model, 1, "layer_drop", batches=batches_of(model), protect=[1, 2, 3])


def test_the_search_passes_over_what_the_config_cannot_describe():
    """Every second layer has experts: of pairs, only neighbours can go."""
    model = build("qwen2_moe", layers=6, decoder_sparse_step=2, mlp_only_layers=[])
    batches = batches_of(model)
    plan = plan_depth(model, 2, batches=batches, protect=False)
    assert plan.layers[0] % 2 != plan.layers[1] % 2
