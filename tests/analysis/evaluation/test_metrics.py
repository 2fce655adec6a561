import pytest
import torch

from hf_cod import perplexity
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.likelihood import negative_log_likelihood
from hf_cod.layers.task import targets, task_of
from tests import references
from tests.tiny_models import batch_for, build

METRIC_FILE = """
import evaluate
import datasets


class Agreement(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"agreement": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_perplexity_against_the_formula(padding):
    model = build("llama")
    batch = batch_for(model, padding)
    found = perplexity(model, [batch])
    assert found == pytest.approx(references.perplexity(model, batch), rel=1e-6)
    assert perplexity(model, [{**batch, "use_cache": False, "position_ids": None}]) == found, "flags go as they are"


def test_loss_in_chunks_is_the_loss():
    logits, labels = torch.randn(3, 50, 7) * 5, torch.randint(0, 7, (3, 50))
    labels[0, :4] = -100
    expected = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits, labels), expected)


def test_targets_never_cross_samples_or_padding():
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert targets(batch, "causal_lm").tolist() == [[2, 3, -100], [5, -100, -100]]


def test_tasks():
    assert [task_of(build(f)) for f in ("llama", "gpt2", "bert", "vit", "bert_headless", "dinov2")] == [
        "causal_lm", "causal_lm", "masked_lm", "labels", "headless", "headless",
    ]  # fmt: skip


def test_perplexity_of_an_encoder_decoder_is_that_of_its_labels_and_its_own_loss():
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 19}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(1, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :4].contiguous()
    batch = {"input_ids": ids, "labels": labels, "decoder_input_ids": torch.nn.functional.pad(ids[:, :3], (1, 0))}
    assert task_of(model) == task_of(model, [batch]) == "seq2seq_lm"
    assert task_of(model, [{"input_ids": ids}]) == "unlabelled"
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    assert perplexity(model, [batch]) == pytest.approx(float(loss.exp()), rel=1e-5)
    assert task_of(T5EncoderModel(model.config)) == "headless"


def test_a_head_is_recognised_under_any_name():
    """Perplexity is that of the logits, shifted; the models without head of both families have no task."""
    from transformers import BertGenerationConfig, BertGenerationDecoder, BertGenerationEncoder

    sizes = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertGenerationDecoder(BertGenerationConfig(**sizes, is_decoder=True, pad_token_id=0)).eval()
    ids = torch.randint(3, 99, (2, 12))
    assert task_of(model) == "causal_lm" and task_of(BertGenerationEncoder(model.config)) == "headless"
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert perplexity(model, [{"input_ids": ids}]) == pytest.approx(float(losses.exp()), rel=1e-5)


def test_an_evaluate_module_counts_as_our_accuracy(tmp_path):
    folder = tmp_path / "agreement"
    folder.mkdir()
    (folder / "agreement.py").write_text(METRIC_FILE)
    model = build("llama")
    batch = batch_for(model, "right")
    with torch.no_grad():
        outputs = model(**batch)
    ours = find_metric("accuracy", "causal_lm")
    theirs = find_metric(str(folder), "causal_lm")
    assert theirs.name == "agreement"
    expected = ours.value(ours.rows(outputs, batch, None))
    assert theirs.value(theirs.rows(outputs, batch, None)) == pytest.approx(expected)
    logits, ids, mask = outputs.logits, batch["input_ids"], batch["attention_mask"]
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:])[mask[:, 1:].bool()]
    assert expected == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize(
    "metric, task, message",
    [
        ("perplexity", "classes", "expected a language model for perplexity"),
        ("accuracy", "regression", "expected class labels for accuracy"),
        ("loss", "causal_lm", "expected a regression or multi-label head for loss"),
        ("perplexity", "headless", "output_angle or a callable"),
        ("no_such_metric", "causal_lm", "evaluate module, got 'no_such_metric'"),
        (3, "causal_lm", "a name, an evaluate module or a callable, got 3"),
    ],
)
def test_bad_metrics(metric, task, message):
    with pytest.raises(ValueError, match=message):
        find_metric(metric, task)


def test_a_callable_must_give_one_score_a_sample():
    metric = find_metric(lambda outputs, batch: torch.zeros(2), "labels")
    with pytest.raises(ValueError, match="expected 3 scores for 3 samples, got 2"):
        metric.rows(None, {"input_ids": torch.zeros(3, 4)}, None)


def test_logits_for_other_tokens_than_those_of_the_text_are_refused():
    """GIT returns logits for the places of an image, too."""
    with pytest.raises(ValueError, match=r"^batches: expected logits for the \(3, 9\) tokens of .*, got \(3, 14\)"):
        negative_log_likelihood(torch.zeros(3, 14, 5), torch.zeros(3, 9, dtype=torch.long))
