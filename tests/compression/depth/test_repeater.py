import pytest
import torch

from hf_cod import RepeatPlan, plan_repeat, repeat, repeat_layers, split_samples
from hf_cod.compression.depth.repeat_search import blocks_of, search_cost
from hf_cod.functional.depth import bootstrap_interval
from hf_cod.io.journal import Journal
from tests.layers.removal.references import with_block
from tests.tiny_models import batch_for, build, build_encoder_decoder, seq2seq_batch


def batches_of(model, count=16):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 99, (count, 8), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(3)]


@torch.no_grad()
def rows_of(model, batches):
    """(sum of negative log likelihoods, tokens) of each sample."""
    rows = []
    for batch in batches:
        likely = model(**batch, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        found = -likely.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        rows += [[float(sample.sum()), len(sample)] for sample in found]
    return torch.tensor(rows, dtype=torch.float64)


def loss_of(rows):
    return float(rows[:, 0].sum() / rows[:, 1].sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_a_search_against_naive_losses(family):
    model = build(family)
    batches = batches_of(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_repeat(model, [1, 2, 4], batches=batches, times=3)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    seen, unseen = split_samples(batches, 8)
    blocks = [(start, start + n) for n in (1, 2, 4) for start in range(5 - n)]
    expected = {block: loss_of(rows_of(with_block(model, *block, times=3), seen)) for block in blocks}
    found = {(each["start"], each["end"]): each["loss"] for each in plan.candidates}
    assert found.keys() == expected.keys()
    assert all(found[block] == pytest.approx(expected[block], rel=1e-5) for block in blocks)
    assert [*found.values()] == sorted(found.values())
    best = min(expected, key=lambda block: expected[block])
    assert (plan.start, plan.end, plan.times, plan.criterion, plan.metric) == (*best, 3, "search", "loss")
    intact, repeated = rows_of(model, unseen), rows_of(with_block(model, *best, times=3), unseen)
    assert plan.losses == {
        "intact": pytest.approx(loss_of(intact), rel=1e-5),
        "repeated": pytest.approx(loss_of(repeated), rel=1e-5),
        "searched": pytest.approx(loss_of(rows_of(model, seen)), rel=1e-5),
    }
    both = torch.stack([intact, repeated], 1)
    ends = bootstrap_interval(both, lambda m: m[:, 1, 0] / m[:, 1, 1] - m[:, 0, 0] / m[:, 0, 1], seed=0)
    assert plan.interval == pytest.approx([float(end) for end in ends], abs=1e-5)
    assert plan.gains == (plan.interval[1] < 0)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_sides_of_t5(side):
    """The first layer hands position biases on."""
    model = build_encoder_decoder("t5")
    batch = seq2seq_batch(model)
    batch["labels"] = batch["decoder_input_ids"]
    plan = plan_repeat(model, 2, batches=[batch], stack=side)
    for found in plan.candidates:
        made = with_block(model, found["start"], found["end"], layers_path=side)
        seen, _ = split_samples([batch], len(batch["input_ids"]) // 2)
        with torch.no_grad():
            loss = float(made(**seen[0], use_cache=False).loss)
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert plan.interval == [] and not plan.gains


def test_a_search_resumes_and_counts_what_it_says(tmp_path, monkeypatch):
    model, runs = build("llama"), []
    batches = batches_of(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    whole = plan_repeat(model, [1, 2], batches=batches)
    samples = sum(runs)
    runs.clear()
    add, count = Journal.add, []

    def dies(self, key, value):
        add(self, key, value)
        count.append(key)
        if len(count) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        plan_repeat(model, [1, 2], batches=batches, journal=tmp_path)
    monkeypatch.setattr(Journal, "add", add)
    before = sum(runs)
    assert plan_repeat(model, [1, 2], batches=batches, journal=tmp_path) == whole
    assert before < samples and sum(runs) < before + samples
    runs.clear()
    plan_repeat(model, [1, 2], batches=batches, journal=tmp_path)
    assert sum(runs) < samples / 5
    # Blocks (1, 2) ... (3, 4) and (1, 3), (2, 4) after their ends, those from layer 0 in whole.
    assert search_cost(4, [1, 2]) == 2 + (1 + 4 + 2 + 4 + (1 + 2) + (1 + 1) + 1 + (2 + 1) + 2) / 4


def test_other_metrics(tmp_path):
    model = build("llama")
    batches = batches_of(model)
    plan = plan_repeat(model, 1, batches=batches, metric="accuracy")
    assert plan.metric == "accuracy" and -1 <= plan.losses["intact"] <= 0 and len(plan.interval) == 2

    def last_token(outputs, batch):
        return outputs.logits[:, -1].argmax(-1) == batch["input_ids"][:, 0]

    assert plan_repeat(model, 1, batches=batches, metric=last_token, journal=tmp_path).metric == "last_token"
    with pytest.raises(ValueError, match=r"^metric: expected one that says how good an output is, got output_angle"):
        plan_repeat(build("bert_headless"), 1, batches=[batch_for(build("bert_headless"))])


def test_a_block_that_the_config_cannot_describe_is_not_chosen():
    """Layers 0 and 1 are dense, and the config counts them."""
    model = build("deepseek_v3")
    plan = plan_repeat(model, 2, batches=batches_of(model))
    assert {(found["start"], found["end"]) for found in plan.candidates} == {(0, 2), (1, 3), (2, 4)}
    assert (plan.start, plan.end) != (1, 3)


def test_repeat_layers_does_what_repeat_does_and_reports_it(tmp_path):
    model, other = build("llama"), build("llama")
    batches = batches_of(model)
    plan = plan_repeat(model, 2, batches=batches)
    plan.save(tmp_path / "repeat_plan.json")
    assert RepeatPlan.load(tmp_path / "repeat_plan.json") == plan
    report = repeat_layers(model, plan, name="mine")
    order = repeat(other, plan.start, plan.end)
    assert torch.equal(model(**batches[0]).logits, other(**batches[0]).logits)
    assert report.results["order"] == plan.order == order and report.model == "mine"
    assert report.layers["runs"] == [order.count(i) for i in range(4)]
    counts = {"intact": sum(p.numel() for p in build("llama").parameters())}
    counts["repeated"] = sum(p.numel() for p in model.parameters())
    assert report.results["parameters"] == counts and counts["repeated"] > counts["intact"]
    assert ("This block lowers the loss." in report.summary) == plan.gains
    given = repeat_layers(build("llama"), (1, 2))
    assert given.results["criterion"] == "given" and given.results["losses"] == {} and len(given.summary) == 1
    with pytest.raises(ValueError, match="plan: expected"):
        repeat_layers(build("llama", layers=5), plan)


def planned(interval):
    losses = {"intact": 2.0, "repeated": 1.99, "searched": 2.1}
    tried = [{"start": 1, "end": 3, "loss": 2.05}, {"start": 0, "end": 2, "loss": 2.2}]
    return RepeatPlan("m", 1, 3, [5] * 4, 2, "search", tried, losses, interval)


def test_a_null_result_is_told():
    lowers, includes = planned([-0.02, -0.001]), planned([-0.03, 0.004])
    assert lowers.gains and lowers.summary()[-1] == "This block lowers the loss."
    assert not includes.gains and includes.summary()[-1] == "No block was found that lowers the loss."
    assert "1 of 2 blocks have a lower loss" in includes.summary()[0]
    assert "by -0.0100, from 2 to 1.99 (95 % interval -0.0300 to +0.0040)" in includes.summary()[1]
    assert not planned([]).gains and "requires 16 samples" in planned([]).summary()[1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"length": 5}, r"^length: expected 1..4, the number of layers, got 5$"),
        ({"length": 0}, r"^length: expected at least 1, got 0$"),
        ({"length": []}, r"^length: expected at least 1, got none$"),
        ({"times": 1}, r"^times: expected at least 2, got 1$"),
        ({"batches": None}, r"^batches: expected"),
    ],
)
def test_bad_input(how, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        plan_repeat(model, **{"batches": batches_of(model, 4), **how})
    with pytest.raises(ValueError, match="at least two samples"):
        plan_repeat(model, 1, batches=batches_of(model, 1))
    assert blocks_of(3, [2, 1, 2]) == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]
