import copy

import peft
import pytest
import torch
from accelerate import Accelerator

from hf_cod import LayerMonitor, TrainingHistory, diagnose
from tests import references
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like
from tests.tiny_training import PROBE, layer_norms, rows, run_in_two_processes, silenced


def train(model, monitor=None, steps=5, learning_rate=0.05):
    """A plain loop with dropout, whose data are drawn from the global random state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    torch.manual_seed(7)
    model.train()
    for step in range(1, steps + 1):
        ids = torch.randint(3, 99, (4, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        if monitor:
            monitor.read_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        if monitor:
            monitor.measure(step)
    return model


def equal_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_line_says_what_diagnose_says_of_the_model_at_that_step():
    model = build("llama", attention_dropout=0.2)
    monitor = LayerMonitor(model, PROBE, every=5)
    train(model, monitor)
    steps = [line["step"] for line in monitor.history.lines]
    assert steps == [1, 5]
    report = diagnose(model, batches=PROBE, metrics=["angular_distance", "output_variance"], show_progress=False)
    last = monitor.history.lines[-1]
    for measure in ("variance", "max_abs", "added_share", "angular_distance"):
        assert last[measure] == pytest.approx(report.layers[measure], rel=1e-12), measure
    assert last["effective_depth"] == report.results["effective_depth"]["value"]
    assert last["late_share"] == report.results["late_share"]
    states = references.hidden_states(model.eval(), PROBE[0])
    assert last["variance"] == pytest.approx([float(x.var(unbiased=False)) for x in states[1:]], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_training_is_bit_equal_with_and_without(family):
    options = {"attn_pdrop": 0.2} if family == "gpt2" else {"attention_dropout": 0.1}
    watched = build(family, **options)
    train(watched, LayerMonitor(watched, PROBE, every=2))
    assert watched.training and watched.config.use_cache == build(family).config.use_cache
    assert equal_weights(watched, train(build(family, **options)))
    assert not equal_weights(watched, train(build(family))), "dropout was at work"


def test_random_numbers_are_left_alone():
    model = build("llama")
    data = torch.utils.data.DataLoader(rows(8), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    monitor = LayerMonitor(model, data, every=1)
    model.model.layers[0].register_forward_hook(lambda *_: torch.rand(1) and None)  # a model that draws in eval mode
    monitor.measure(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_due_steps_are_measured():
    model = build("llama")
    monitor = LayerMonitor(model, PROBE, every=3)
    assert [step for step in range(1, 10) if monitor.due(step)] == [1, 3, 6, 9]
    assert monitor.measure(2) is None
    assert monitor.measure(3)["gradient_norm"] is None, "nobody read them"
    monitor.read_gradients(6)
    assert monitor.measure(9)["gradient_norm"] is None, "those were of another step"


def test_gradient_norms_of_the_real_gradients():
    model = build("llama")
    for p in (*model.model.layers[1].parameters(), *model.model.layers[2].mlp.parameters()):
        p.requires_grad_(False)
    monitor = LayerMonitor(model, PROBE, every=1)
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    scale = 1024.0
    for part in ids.split(2):
        (model(input_ids=part, labels=part).loss / 4 * scale).backward()
    monitor.read_gradients(1, loss_scale=scale)
    found = monitor.measure(1)["gradient_norm"]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = layer_norms(model)
    assert found[1] is None and expected[1] == 0
    assert [found[i] for i in (0, 2, 3)] == pytest.approx([expected[i] for i in (0, 2, 3)], rel=1e-5)


def test_bfloat16_gradients_are_summed_in_float32():
    model = build("llama", dtype=torch.bfloat16)
    monitor = LayerMonitor(model, PROBE, every=1)
    model(input_ids=PROBE[0]["input_ids"], labels=PROBE[0]["input_ids"]).loss.backward()
    monitor.read_gradients(1)
    assert monitor.measure(1)["gradient_norm"] == pytest.approx(layer_norms(model), rel=1e-5)


def test_in_an_accelerate_loop(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(rows(32), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    texts = ["one two three four five six seven eight nine ten"] * 9
    history = tmp_path / "history.jsonl"
    options = {"tokenizer": gpt_like(), "history": history, "every": 2, "sequence_length": 8}
    monitor = LayerMonitor(model, texts, **options)
    step, tracked = 0, {}
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                step += 1
                monitor.read_gradients(step)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients and (line := monitor.measure(step)):
                tracked[step] = monitor.figures(line)
    assert list(tracked) == [1, 2, 4]
    assert len(tracked[4]) == 2 + 3 * 4 and tracked[4]["depth/variance/layer_3"] > 0
    assert TrainingHistory.load(tmp_path).lines == monitor.history.lines
    resumed = LayerMonitor(model, texts, **options, step=2)
    assert [line["step"] for line in resumed.history.lines] == [1, 2]


def test_figures_of_evenly_spaced_layers():
    model = build("llama", layers=11)
    line = LayerMonitor(model, PROBE).measure(1)
    for count, expected in ((0, []), (1, [0]), (2, [0, 10]), (4, [0, 3, 7, 10]), (99, list(range(11)))):
        figures = LayerMonitor(model, PROBE, logged_layers=count).figures(line)
        assert [name for name in figures if "variance" in name] == [f"depth/variance/layer_{i:02}" for i in expected]
        assert "depth/effective_depth" in figures and not any("gradient" in name for name in figures), "none were read"


def test_activations_that_are_not_finite_are_told_and_training_goes_on():
    model = build("llama")
    monitor = LayerMonitor(model, PROBE, every=1)
    monitor.measure(1)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] = torch.inf
    line = monitor.measure(2)
    assert "variance" not in line and "the output of layer 2" in line["failure"]
    assert monitor.figures(line) == {}
    assert monitor.new_trouble() == [f"step 2: {line['failure']}"]
    monitor.measure(3)
    assert monitor.new_trouble() == [], "told once"


def test_dead_layers_are_told():
    monitor = LayerMonitor(silenced(build("llama"), 2), PROBE, every=1)
    told = []
    for step in range(1, 6):
        monitor.measure(step)
        told.append(monitor.new_trouble())
    assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0]
    assert told[2][0].startswith("step 3: layer 2 seems dead: it turns the hidden state by")


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_compiled_models_are_measured_and_go_on_compiled(whole):
    torch._dynamo.reset()
    plain = build("llama")
    compiled = copy.deepcopy(plain)
    count = torch._dynamo.testing.CompileCounter()
    if whole:
        wrapped = torch.compile(compiled, backend=count)
    else:
        for layer in compiled.model.layers:
            layer.compile(backend=count)
        wrapped = compiled
    monitor = LayerMonitor(wrapped, PROBE, every=2)
    expected = LayerMonitor(plain, PROBE, every=2)
    train(wrapped, steps=1)
    frames = count.frame_count
    assert frames > 0
    train(wrapped, monitor, steps=4)
    assert count.frame_count == frames, "nothing was compiled again"
    train(plain, steps=1)
    train(plain, expected, steps=4)
    for line, other in zip(monitor.history.lines, expected.history.lines, strict=True):
        assert line["variance"] == pytest.approx(other["variance"], rel=1e-3)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_adapters_are_what_trains():
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 3]))
    monitor = LayerMonitor(model, PROBE, every=1)
    train(model, monitor, steps=1)
    norms = monitor.history.lines[0]["gradient_norm"]
    assert norms[0] is None and norms[2] is None and norms[1] > 0 and norms[3] > 0


@pytest.mark.process
def test_shards_of_fsdp2_are_measured_as_the_whole_model(tmp_path):
    run_in_two_processes("fsdp", tmp_path)
    found = torch.load(tmp_path / "fsdp.pt")
    assert all(torch.equal(value, found["without"][name]) for name, value in found["with"].items())
    whole = {line["step"]: line for line in found["whole"]}
    assert [line["step"] for line in found["lines"]] == [1, 2, 4]
    for line in found["lines"]:
        for measure in ("gradient_norm", "variance", "angular_distance"):
            assert line[measure] == pytest.approx(whole[line["step"]][measure], rel=1e-4), measure


def test_samples_are_no_longer_than_the_model():
    monitor = LayerMonitor(build("llama"), tokenizer=gpt_like())
    assert monitor.settings.sequence_length == 64
    assert monitor.batches[0]["input_ids"].shape == (4, 64) and len(monitor.batches) == 4


def test_bad_settings():
    model = build("llama")
    for settings, message in (
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"logged_layers": -1}, "logged_layers: expected at least 0"),
        ({"max_samples": 0}, "max_samples: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerMonitor(model, PROBE, **settings)
    with pytest.raises(ValueError, match="probe: expected a tokenizer"):
        LayerMonitor(model)
    with pytest.raises(ValueError, match=r"model: expected a config that counts the layers"):
        LayerMonitor(torch.nn.Linear(2, 2), PROBE)


def test_the_last_step_is_measured():
    model = build("llama")
    monitor = LayerMonitor(model, PROBE, every=10, last=14)
    assert [step for step in range(1, 16) if monitor.due(step)] == [1, 10, 14]


def test_a_probe_that_the_model_does_not_take_is_told_at_once():
    model = build("llama")
    with pytest.raises(ValueError, match="probe: expected batches that fit the model, got on the first one"):
        LayerMonitor(model, [{"input_ids": torch.full((2, 5), 10), "attention_mask": torch.ones(2, 3, 5, 7)}])
    with pytest.raises(ValueError, match="got DeepSpeed, whose gradients cannot be read"):
        LayerMonitor(type("DeepSpeedEngine", (torch.nn.Sequential,), {})(model), PROBE)


def test_gradients_that_are_gone_are_told_once(caplog):
    model = build("llama")
    monitor = LayerMonitor(model, PROBE, every=1)
    for step in (1, 2):
        monitor.read_gradients(step)
        monitor.measure(step)
    assert caplog.text.count("no layer has a gradient to read") == 1
