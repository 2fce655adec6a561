"""hf-cod convert: there and back."""

import torch

from hf_cod import RunReport
from hf_cod.cli.main import main
from hf_cod.io.models import load_model


def test_convert_to_lns_and_back_gives_equal_logits(checkpoint, capsys):
    stock, lns, back = (str(checkpoint / name) for name in ("model", "lns", "back"))
    assert main(["convert", "lns", stock, lns]) == 0
    assert main(["convert", "stock", lns, "--output_dir", back]) == 0
    shown = capsys.readouterr().out
    assert "CodLlamaForCausalLM" in shown and all(sentence in shown for sentence in RunReport.load(back).summary)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        first, middle, last = (load_model(name)[0](ids).logits for name in (stock, lns, back))
    torch.testing.assert_close(middle, first, atol=1e-5, rtol=0)
    torch.testing.assert_close(last, first, atol=1e-5, rtol=0)
    assert load_model(back)[1] is not None, "the tokenizer comes along"
    assert main(["convert", "stock", lns, back]) == 2
    assert main(["convert", "stock", lns]) == 2
    assert main(["convert", "stock", lns, back, "--output", back]) == 2
    shown = capsys.readouterr().err
    assert "output: expected a new directory, an empty one" in shown and "output: expected one directory" in shown
    assert "output: expected a new directory for the result, got none" in shown
    assert main(["convert", "authors", stock, str(checkpoint / "x")]) == 2
    assert "set --norm-type" in capsys.readouterr().err
