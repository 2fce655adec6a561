import copy
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from examples.tiny_architectures import tiny_config
from hf_cod import DiagnoseSettings, MeasurementError, RunReport, diagnose, pack_sparse, plan_depth, prune, skip
from hf_cod.analysis.diagnostics import diagnosis
from hf_cod.analysis.diagnostics.applicable import applicable
from hf_cod.analysis.diagnostics.findings import summarize
from hf_cod.analysis.diagnostics.settings import METRICS
from tests.forged import forge, with_first_number
from tests.references import without_layer
from tests.tiny_models import FAMILIES, batch_for, build, two_batches
from tests.tiny_tokenizers import bert_like, gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = {"sequence_length": 8, "max_samples": 4, "batch_size": 2, "show_progress": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_whole_report(family):
    model = build(family)
    batch = batch_for(model)
    if family == "vit":
        batch["labels"] = torch.tensor([0, 1, 2])
    if family in ("bert", "mpnet"):
        batch["labels"] = batch["input_ids"].masked_fill(torch.rand(3, 9) > 0.5, -100)
    report = diagnose(model, batches=[batch] * 3, show_progress=False)
    headless = family in ("bert_headless", "dinov2")
    assert ("gradient_norm" in report.layers) != headless
    assert bool(report.notes) == headless
    assert all(len(values) == 4 for values in report.layers.values())
    assert len(report.results["angular_distance"]) == 4
    depth = report.results["effective_depth"]
    assert 1 <= depth["low"] <= depth["value"] + 1e-9 and depth["high"] <= 4
    assert len(report.summary) == (4 if headless else 5)


def test_texts_and_reload(tmp_path):
    report = diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, name="tiny", **QUICK)
    assert RunReport.load(tmp_path) == report
    assert report.settings["samples"] == 4 and report.settings["tokens"] == 32
    assert "tiny" in (tmp_path / "report.md").read_text()


def test_masked_language_models_are_measured_on_hidden_tokens():
    report = diagnose(build("bert"), bert_like(), TEXT, **QUICK)
    assert report.results["layer_drop"]["metric"] == "perplexity"


def test_same_seed_same_report():
    first, second = (diagnose(build("llama"), gpt_like(), TEXT, seed=7, **QUICK) for _ in range(2))
    assert first.layers == second.layers and first.results == second.results


def test_a_finished_run_is_not_measured_again(tmp_path, monkeypatch):
    report = diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, **QUICK)

    def never(*args, **kwargs):
        raise AssertionError("measured twice")

    for name in ("measure_forward", "measure_gradient_norm"):
        monkeypatch.setattr(diagnosis, name, never)
    again = diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, **QUICK)
    assert again.layers == report.layers


def test_another_model_in_the_same_directory_is_measured_anew(tmp_path):
    model = build("llama")
    first = diagnose(model, gpt_like(), TEXT, output=tmp_path, **QUICK)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    second = diagnose(changed, gpt_like(), TEXT, output=tmp_path, **QUICK)
    assert first.layers["layer_drop"] != second.layers["layer_drop"]


def test_two_stacks_of_a_model_in_one_directory(tmp_path):
    """CLIP's towers, whose own outputs are similarities of texts and images."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("vision-language/clip")).eval()
    batches = [{**batch_for(model), "pixel_values": torch.randn(3, 3, 16, 16)}]
    for stack in ("text", "vision"):
        report = diagnose(model, batches=batches, stack=stack, output=tmp_path, show_progress=False)
        expected = diagnose(model, batches=batches, stack=stack, show_progress=False)
        assert report.layers == expected.layers and max(report.layers["layer_drop"]) > 0
        told = f"layer_drop: output_angle is measured on the last hidden state of the {stack} tower"
        assert told in report.notes
    plan = plan_depth(model, 1, "search", batches=[*batches, *batches, *batches], stack="vision")
    assert len(plan.layers) == 1 and plan.metric == "output_angle"


def test_nothing_is_resumed_from_work_that_only_looks_the_same(tmp_path):
    """Equal weights, but another dtype, config, adapter state or metric of the same name."""
    from peft import LoraConfig, get_peft_model

    model = build("llama", dtype=torch.bfloat16)
    batches = [batch_for(model)]

    def measured(model, **options):
        return diagnose(model, batches=batches, output=tmp_path, show_progress=False, **options).layers

    narrow, wide = measured(model), measured(model.float())
    assert narrow["variance"] != wide["variance"]
    model.config.rms_norm_eps = 0.5
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    assert measured(model)["variance"] != wide["variance"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    enabled = measured(adapted)
    with adapted.disable_adapter():
        assert measured(adapted)["variance"] != enabled["variance"]
    first = measured(model, drop_metric=lambda outputs, batch: outputs.logits.amax((1, 2)))
    second = measured(model, drop_metric=lambda outputs, batch: outputs.logits.amin((1, 2)))
    assert first["layer_drop"] != second["layer_drop"]


def test_another_setting_keeps_what_the_others_measured(tmp_path, monkeypatch):
    options = {"output": tmp_path, **QUICK}
    whole = diagnose(build("llama"), gpt_like(), TEXT, **options)
    diagnose(build("llama"), gpt_like(), TEXT, metrics=["gradient_norm"], **options)
    monkeypatch.setattr(diagnosis, "measure_forward", lambda *a, **k: pytest.fail("measured twice"))
    again = diagnose(build("llama"), gpt_like(), TEXT, drop_metric="accuracy", **options)
    assert again.layers["variance"] == whole.layers["variance"]
    assert again.results["layer_drop"]["metric"] == "accuracy"


def test_models_that_need_labels_are_measured_without_them():
    report = diagnose(build("vit"), batches=[batch_for(build("vit"))], show_progress=False)
    assert report.results["layer_drop"]["metric"] == "output_angle"
    assert report.notes == [
        "gradient_norm was left out: ViTForImageClassification requires labels, or other inputs of which it makes a "
        "loss, and the batches have none"
    ]
    with pytest.raises(ValueError, match="output_angle or a callable for batches without labels, got 'accuracy'"):
        diagnose(build("vit"), batches=[batch_for(build("vit"))], drop_metric="accuracy")


def test_a_reward_is_compared_by_its_size():
    """The angle of a single number would be that of its sign."""
    model = headed("regression").eval()
    batch = {"input_ids": torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))}
    drop = diagnose(model, batches=[batch], metrics=["layer_drop"], show_progress=False).layers["layer_drop"]
    with torch.no_grad():
        intact, found = model(**batch).logits, []
        for layer in range(len(drop)):
            with skip(model, [layer]):
                without = model(**batch).logits
            found.append(float((without - intact).abs().sum() / (without.abs() + intact.abs()).sum()))
    assert drop == pytest.approx(found, rel=1e-5) and 0 < min(found) < max(found) < 1


@pytest.mark.parametrize(
    "head, labels, metric",
    [
        ("sequence_classification", torch.tensor([0, 2]), "accuracy"),
        ("sequence_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "loss"),
        ("regression", torch.tensor([0.5, -1]), "loss"),
        ("token_classification", torch.tensor([[0, 2, -100, 1], [1, 1, 0, -100]]), "accuracy"),
        ("question_answering", None, "output_angle"),
    ],
)
def test_each_head_has_its_metric(head, labels, metric):
    model = headed(head)
    batch = {"input_ids": torch.randint(3, 50, (2, 4), generator=torch.Generator().manual_seed(0))}
    target = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    batch |= target if labels is None else {"labels": labels}
    report = diagnose(model, batches=[batch], show_progress=False)
    drop = report.results["layer_drop"]
    assert (drop["metric"] == metric and len(set(drop["without"])) > 1) or metric == "accuracy"
    assert report.notes == [] and min(report.layers["gradient_norm"]) > 0
    if metric == "loss":
        with torch.no_grad():
            assert drop["intact"] == pytest.approx(float(model(**batch).loss), rel=1e-6)
            for i, value in enumerate(drop["without"]):
                assert value == pytest.approx(float(without_layer(model, i)(**batch).loss), rel=1e-6)


def headed(head):
    """A tiny encoder with another head."""
    autos = {
        "token_classification": AutoModelForTokenClassification,
        "question_answering": AutoModelForQuestionAnswering,
    }
    labels = {"num_labels": 1 if head == "regression" else 3} if head != "question_answering" else {}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = CONFIG_MAPPING["bert"](**sizes, **labels, num_hidden_layers=3, initializer_range=0.2)
    torch.manual_seed(0)
    return autos.get(head, AutoModelForSequenceClassification).from_config(config).eval()


def test_results_of_another_function_of_one_name_are_kept(tmp_path):
    def score(outputs, batch):
        return outputs.logits.amax((1, 2))

    first = diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, drop_metric=score, **QUICK)

    def score(outputs, batch):
        return outputs.logits.amin((1, 2))

    second = diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, drop_metric=score, **QUICK)
    assert RunReport.load(tmp_path).layers == second.layers
    assert RunReport.load(tmp_path / "earlier-1").layers == first.layers != second.layers


def test_quantized_weights_have_no_gradient_norm():
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    report = diagnosis.RunReport("diagnose", "m", {}, {}, {}, {})
    stack, chosen = diagnosis.find_decoder_layers(model), DiagnoseSettings()
    wanted = applicable(chosen, stack, "causal_lm", [batch_for(model)], report)
    assert "gradient_norm" not in wanted and report.notes == ["gradient_norm was left out: weights are quantized"]


@pytest.mark.parametrize("kind", ["ddp", "compile"])
def test_the_model_inside_a_wrapper_is_measured(kind, tmp_path):
    model = build("llama")
    plain = diagnose(model, batches=[batch_for(model)], show_progress=False)
    if kind == "compile":
        wrapped = torch.compile(model)
        assert diagnose(wrapped, batches=[batch_for(model)], show_progress=False).layers == plain.layers
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert diagnose(wrapped, batches=[batch_for(model)], show_progress=False).layers == plain.layers
    finally:
        torch.distributed.destroy_process_group()


def test_a_column_of_a_data_set():
    column = datasets.Dataset.from_dict({"text": [TEXT, TEXT]})["text"]
    assert diagnose(build("llama"), gpt_like(), column, **QUICK).settings["samples"] == 4


def test_few_samples_give_no_interval():
    texts = "one two three four five " * 16
    options = {"sequence_length": 8, "drop_metric": "perplexity", "show_progress": False}
    few = diagnose(build("llama"), gpt_like(), texts, max_samples=7, **options)
    assert few.results["effective_depth"]["low"] is None and few.results["intervals"] == {}
    assert "no interval from fewer than 8 samples" in few.summary[0]
    enough = diagnose(build("llama"), gpt_like(), texts, max_samples=8, **options)
    assert enough.results["effective_depth"]["low"] < enough.results["effective_depth"]["high"]


@pytest.mark.parametrize(("dtype", "turn"), [(torch.float32, 1e-9), (torch.bfloat16, 1e-4)])
def test_layers_that_do_nothing_have_no_effective_depth(dtype, turn):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0)
        layer.mlp.down_proj.weight.data.mul_(turn)
    idle = diagnose(model.to(dtype), gpt_like(), TEXT, **QUICK)
    assert "effective_depth" not in idle.results and "late_share" not in idle.results
    assert any("No layer turns the hidden state by more than the precision" in line for line in idle.summary)
    model.model.layers[2].mlp.down_proj.weight.data.normal_()
    one = diagnose(model, gpt_like(), TEXT, **QUICK)
    assert one.results["effective_depth"]["value"] < 1.2
    assert any("3 of 4 layers" in line and "0 to 1, 3." in line for line in one.summary)


def test_a_failing_metric_keeps_what_was_measured(tmp_path):
    def unlucky(outputs, batch):
        raise KeyError("no such column")

    with pytest.raises(MeasurementError, match=r"unlucky failed on batch 0 with the intact model") as caught:
        diagnose(build("llama"), gpt_like(), TEXT, output=tmp_path, drop_metric=unlucky, **QUICK)
    kept = RunReport.load(tmp_path)
    assert kept == caught.value.report
    assert "gradient_norm" in kept.layers and "layer_drop" not in kept.layers


def test_one_layer():
    report = diagnose(build("llama", layers=1), gpt_like(), TEXT, **QUICK)
    assert report.results["effective_depth"]["value"] == pytest.approx(1)
    assert report.results["late_share"] == pytest.approx(0.5)


def test_few_samples_are_remarked():
    texts = "one two three four five " * 8
    few = diagnose(build("llama"), gpt_like(), texts, sequence_length=8, max_samples=50, show_progress=False)
    assert few.notes == ["the text has 5 samples, fewer than 50"] and "no interval" in few.summary[0]
    many = diagnose(build("llama"), gpt_like(), texts * 4, sequence_length=8, max_samples=9, show_progress=False)
    assert many.notes == [] and "95% interval" in many.summary[0]


def test_findings_say_when_a_removal_helps_and_when_nothing_can_be_seen():
    drop = {"metric": "accuracy", "lower_is_better": False, "intact": 0.5, "without": [0.2, 0.6, 0.4]}
    report = RunReport("diagnose", "m", {}, {}, {"layer_drop": [-0.3, 0.1, -0.1]}, {"layer_drop": drop})
    tied = {"layer_drop": {**drop, "without": [0.4, 0.4]}}
    report_of = lambda change, found: RunReport("diagnose", "m", {}, {}, {"layer_drop": change}, found)  # noqa: E731
    assert summarize(report_of([-0.1, -0.1], tied)) == [
        "The removal of each single layer has the same effect: accuracy changes from 0.5 to 0.4."
    ]
    helping = {"layer_drop": {**drop, "without": [0.5, 0.7]}}
    assert summarize(report_of([0.0, 0.2], helping)) == [
        "No single removal is harmful: accuracy is 0.5 with all layers, 0.5 to 0.7 without one."
    ]
    some = {"layer_drop": {**drop, "without": [None, 0.5, 0.7]}}
    assert summarize(report_of([None, 0.0, 0.2], some)) == [
        "None of the measured removals is harmful: accuracy is 0.5 with all layers, 0.5 to 0.7 without one."
    ]
    harmful = {"layer_drop": {**drop, "without": [0.4, None, 0.3]}}
    assert summarize(report_of([-0.1, None, -0.2], harmful))[0].startswith(
        "Removing one of the measured layers is most "
    )
    assert "is most harmful for layer 0 and least for layer 1" in summarize(report)[0]
    assert summarize(report)[0].endswith(" It improves if layer 1 is removed.")
    two = {"layer_drop": {**drop, "without": [0.6, 0.2, 0.7]}}
    assert summarize(report_of([0.1, -0.3, 0.2], two))[0].endswith(" It improves if layer 0 or layer 2 is removed.")
    three = {"layer_drop": {**drop, "without": [0.6, 0.7, 0.2, 0.8]}}
    assert summarize(report_of([0.1, 0.2, -0.3, 0.3], three))[0].endswith(
        " It improves if any single one of 3 layers is removed: 0 to 1, 3."
    )
    nothing = {"layer_drop": {**drop, "intact": 0.0, "without": [0.0, 0.0, 0.0]}}
    report = RunReport("diagnose", "m", {}, {}, {"layer_drop": [0.0, 0.0, 0.0]}, nothing)
    assert summarize(report) == ["The intact model's accuracy is 0, so the removal of a layer cannot lower it."]


def test_one_metric_by_name():
    batch = {"input_ids": torch.randint(3, 50, (2, 9))}
    assert list(diagnose(build("llama"), batches=[batch], metrics="block_influence").layers) == ["block_influence"]


def test_chosen_metrics_only():
    report = diagnose(build("llama"), gpt_like(), TEXT, metrics=["block_influence"], **QUICK)
    assert list(report.layers) == ["block_influence"]


def test_peft_models_are_measured_with_their_adapters():
    from peft import LoraConfig, get_peft_model

    plain = build("llama")
    batch = batch_for(plain)
    before = diagnose(plain, batches=[batch], show_progress=False)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    flags = [p.requires_grad for p in adapted.parameters()]
    after = diagnose(adapted, batches=[batch], show_progress=False)
    assert before.layers["layer_drop"] != after.layers["layer_drop"]
    assert flags == [p.requires_grad for p in adapted.parameters()]


def test_bad_input():
    model = build("llama")
    with pytest.raises(ValueError, match=f"metrics: expected some of {next(iter(METRICS))}.*, got speed"):
        diagnose(model, gpt_like(), TEXT, metrics=["speed"])
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        diagnose(model, batches=[])
    with pytest.raises(ValueError, match="texts: expected strings, got dict"):
        diagnose(model, gpt_like(), [{"text": TEXT}], **QUICK)
    with pytest.raises(ValueError, match="texts: expected strings, got dict; pass the column"):
        diagnose(model, gpt_like(), datasets.Dataset.from_dict({"text": [TEXT]}), **QUICK)
    with pytest.raises(ValueError, match="texts: expected strings, got dict; pass the column"):
        diagnose(
            model, gpt_like(), datasets.Dataset.from_dict({"text": [TEXT]}).to_iterable_dataset(), pack=False, **QUICK
        )
    with pytest.raises(ValueError, match="texts: expected strings, got PosixPath; read the file"):
        diagnose(model, gpt_like(), Path("novel.txt"), **QUICK)
    with pytest.raises(ValueError, match="batches: expected dicts of tensors, got list as batch 0"):
        diagnose(model, batches=[[1, 2, 3]])
    with pytest.raises(ValueError, match="batches: expected tensors, got list as 'input_ids' of batch 0"):
        diagnose(model, batches=[{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="model: expected a loaded model, got 'gpt2'"):
        diagnose("gpt2", gpt_like(), TEXT)
    with pytest.raises(ValueError, match=r"output: expected a directory, got .*, which is a file"):
        diagnose(model, gpt_like(), TEXT, output=__file__, **QUICK)
    with pytest.raises(ValueError, match="sequence_length: expected at most the model's 64, got 65"):
        diagnose(model, gpt_like(), TEXT, sequence_length=65)
    with pytest.raises(ValueError, match="batches: expected batches, or tokenizer and texts, got neither"):
        diagnose(model)
    with pytest.raises(ValueError, match="at least one sample"):
        diagnose(model, gpt_like(), "one two", **QUICK)
    with pytest.raises(ValueError, match="token: expected 'last', 'first' or 'all', got 'middle'"):
        diagnose(model, gpt_like(), TEXT, token="middle", **QUICK)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="first in the output of layer 2"):
        diagnose(model, gpt_like(), TEXT, **QUICK)


def test_another_packed_model_in_the_same_directory_is_measured_again(tmp_path):
    """Matrices of packed models are buffers. Embeddings, norms and masks are the same here."""
    found = []
    for factor in (1.0, -0.5):
        model = build("llama")
        prune(model, 0.5, method="magnitude")
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data *= factor
        pack_sparse(model, 0.4)
        found.append(diagnose(model, batches=two_batches(model), output=tmp_path, show_progress=False))
    alone = diagnose(model, batches=two_batches(model), show_progress=False)
    assert found[1].layers == alone.layers != found[0].layers


CHANGES = {
    "null": lambda value: None,
    "text": lambda value: with_first_number(value, "x"),
    "true": lambda value: with_first_number(value, True),
    "below the range": lambda value: with_first_number(value, -5.0),
    "infinite": lambda value: with_first_number(value, float("inf")),
    "nested": lambda value: with_first_number(value, [1.0]),
    "short": lambda value: value[:-1] if isinstance(value, list) else {**value, "layers": {}},
    "empty": lambda value: type(value)(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_in_a_journal_that_cannot_be_this_models_are_computed_again(name, tmp_path, caplog):
    model = build("llama")
    whole = diagnose(model, batches=two_batches(model), output=tmp_path)
    forge(tmp_path / "journal.jsonl", CHANGES[name])
    resumed = diagnose(model, batches=two_batches(model), output=tmp_path)
    assert (resumed.layers, resumed.results) == (whole.layers, whole.results)
    assert "has a damaged result" in caplog.text
    caplog.clear()
    again = diagnose(model, batches=two_batches(model), output=tmp_path)
    assert again.results == whole.results and not caplog.records
