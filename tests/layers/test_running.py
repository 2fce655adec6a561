"""Signs of life of long work, and the hidden state among the arguments of a layer."""

import io
import sys

import pytest
import torch
from torch import nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from hf_cod import prune, score_layers
from hf_cod.layers import running
from hf_cod.layers.running import busy, hidden_input, hidden_place, progress, with_hidden


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_work_that_takes_a_while_is_named_on_a_terminal(monkeypatch):
    """While it goes on, also where it fails; afterwards the line is empty."""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with busy("loading mine"):
        assert "loading mine" in screen.getvalue()
    with pytest.raises(KeyError), busy("loading yours"):
        raise KeyError
    assert "loading yours" in screen.getvalue()
    _, last, left = screen.getvalue().split("\r")[-3:]
    assert last.strip() == "" == left, "the line is wiped"


def test_nothing_is_shown_elsewhere(monkeypatch, capsys):
    with busy("loading mine"):
        pass
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with busy("loading mine", show=False):
        pass
    assert capsys.readouterr() == ("", "") and screen.getvalue() == ""


def test_a_log_file_gets_a_line_of_progress_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    assert list(progress(range(3), "pruning", True)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "pruning: 3 of 3, about 00:00 left" and not any("\r" in line for line in lines)
    assert list(progress(range(3), "pruning", False)) == [0, 1, 2]
    monkeypatch.setattr(running, "INTERVAL", 1e9)
    assert list(progress(range(3), "pruning", True)) == [0, 1, 2]
    assert capsys.readouterr().err == "", "what is quick needs none"


def test_lines_of_progress_within_others_are_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    for _ in progress(range(2), "outer", True):
        assert list(progress(range(2), "inner", True)) == [0, 1]
    shown = capsys.readouterr().err
    assert "outer" in shown and "inner" not in shown


def test_layers_that_are_given_their_hidden_state_by_another_keyword():
    """PatchTST calls them with `hidden_state=`; its hidden states are (samples, channels, patches, width)."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "prediction_length": 4}
    series = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8}
    model = PatchTSTForPrediction(PatchTSTConfig(**sizes, **series)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.dim() == 2 else None  # layers that do more
    batch = {"past_values": torch.randn(3, 32, 2), "future_values": torch.randn(3, 4, 2)}
    states, layers = [], model.model.encoder.layers
    for layer in layers:
        layer.register_forward_hook(lambda m, args, kw, out: states.append((kw["hidden_state"], out)), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    cosines = [nn.functional.cosine_similarity(x[:, -1].flatten(1), y[0][:, -1].flatten(1)) for x, y in states[:3]]
    expected = [float((c.arccos() / torch.pi).mean()) for c in cosines]
    for layer in layers:
        layer._forward_hooks.clear()
        layer._forward_hooks_with_kwargs.clear()
    found = score_layers(model, method="angular", batches=[batch]).values
    assert torch.as_tensor(found) == pytest.approx(torch.tensor(expected), rel=5e-3)
    prune(model, 0.5, batches=[batch])
    matrices = [p for p in layers.parameters() if p.dim() == 2]
    assert sum(int((p == 0).sum()) for p in matrices) == pytest.approx(sum(p.numel() for p in matrices) / 2, rel=0.01)


def test_the_hidden_state_is_the_one_floating_point_tensor():
    x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert hidden_input((x, mask), {}) is x is hidden_input((), {"mask": mask, "x": x, "table": (x, x)})
    assert hidden_input((), {"other": x + 1, "hidden_states": x}) is x
    args, kwargs = with_hidden((), {"mask": mask, "x": x}, -x)
    assert args == () and torch.equal(kwargs["x"], -x) and kwargs["mask"] is mask
    assert with_hidden((x, mask), {"a": 1}, mask) == ((mask, mask), {"a": 1})
    with pytest.raises(ValueError, match="2 floating-point tensors among the keywords x, y"):
        hidden_place((), {"x": x, "y": x})
