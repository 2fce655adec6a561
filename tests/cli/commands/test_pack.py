"""hf-cod pack: where its model goes."""

import torch

from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from hf_cod.layers.size import size_of
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


def test_sizes_and_closing_sentences_are_those_of_the_other_commands(checkpoint, capsys):
    assert prune(checkpoint, "sparse", "--sparsity", "0.7", "--score", "uniform", "--no-plots") == 0
    sparse, packed = checkpoint / "sparse", checkpoint / "packed"
    assert main(["pack", str(sparse), str(packed)]) == 0
    results = RunReport.load(packed).results
    before = RunReport.load(sparse).results
    assert results["memory_bytes"]["intact"] == before["memory_bytes"]["pruned"]
    assert results["memory_bytes"]["packed"] == size_of(load_model(str(packed))[0]).bytes
    assert results["disk_bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    shown = capsys.readouterr().out
    assert "matrices packed.\n• The full model takes " in shown and "• To load it, import hf_cod before" in shown
