"""hf-cod pack: where its model goes."""

import torch

from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from tests.cli.runs import prune


def test_pack_takes_its_output_by_place_or_by_option(checkpoint, capsys):
    assert prune(checkpoint, "sparse", "--sparsity", "0.7", "--score", "uniform", "--no-plots") == 0
    sparse, packed, other = (str(checkpoint / name) for name in ("sparse", "packed", "other"))
    assert main(["pack", sparse, packed]) == 0
    assert "matrices packed" in capsys.readouterr().out
    assert main(["pack", sparse, "--min-sparsity", "0.6", "--output", other]) == 0
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [load_model(name)[0](ids).logits for name in (sparse, packed, other)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(logits[1], logits[2])
    assert main(["pack", sparse, "--min-sparsity", "0.6", packed]) == 2
    assert main(["pack", sparse, str(checkpoint / "a"), "--output", str(checkpoint / "b")]) == 2
    shown = capsys.readouterr().err
    assert "output: expected a new directory, an empty one" in shown and "output: expected one directory" in shown
