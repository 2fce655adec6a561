"""What is measured where labels are no classes of the model's logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForPreTraining, BertForTokenClassification

from hf_cod import diagnose, find_decoder_layers, score_layers
from hf_cod.analysis.evaluation.outputs import task_of_outputs

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
IDS = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(0))


def with_targets(kind):
    """A model, and a batch with two kinds of labels, or with one of two classes for each token."""
    torch.manual_seed(0)
    model = AutoModelForPreTraining.from_config(AutoConfig.for_model(kind, vocab_size=99, **SIZES)).eval()
    labels = {"labels": IDS % 2} if kind == "electra" else {"labels": IDS, "next_sentence_label": IDS[:, 0] % 2}
    return model, {"input_ids": IDS, **labels}


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_labels_that_are_no_classes_of_logits_leave_the_angle_of_the_output(kind):
    model, batch = with_targets(kind)
    found = diagnose(model, batches=[batch], show_progress=False)
    unlabelled = diagnose(model, batches=[{"input_ids": IDS}], show_progress=False)
    assert found.settings["drop_metric"] == "output_angle"
    assert found.layers["layer_drop"] == unlabelled.layers["layer_drop"] and min(found.layers["layer_drop"]) > 0
    assert found.layers["angular_distance"] == unlabelled.layers["angular_distance"]
    assert len(found.layers["gradient_norm"]) == 3 and "gradient_norm" not in unlabelled.layers
    assert score_layers(model, method="layer_drop", batches=[batch]).values == pytest.approx(found.layers["layer_drop"])
    with pytest.raises(ValueError, match="metric: expected class labels for accuracy, got others; pass a callable"):
        diagnose(model, batches=[batch], drop_metric="accuracy", show_progress=False)


def test_classes_of_each_token_have_an_accuracy():
    config = AutoConfig.for_model("bert", vocab_size=99, num_labels=4, **SIZES)
    model = BertForTokenClassification(config)
    assert task_of_outputs(find_decoder_layers(model), [{"input_ids": IDS, "labels": IDS % 4}]) == "classes"
    assert model.training
