"""hf-cod export: files for other engines."""

import json

import pytest

from hf_cod import LayerAllocation, LayerScores, find_decoder_layers
from hf_cod.cli.main import main
from hf_cod.compression.export.settings import TARGETS
from hf_cod.io.report import RunReport
from tests.cli.runs import QUICK
from tests.compression.export.models import llama
from tests.tiny_tokenizers import gpt_like

BITS = {"llama.cpp": "5", "compressed-tensors": "3.8"}


@pytest.fixture
def arguments(checkpoint):
    llama(hidden_size=128, num_key_value_heads=4).save_pretrained(checkpoint / "wide")
    gpt_like().save_pretrained(checkpoint / "wide")
    return ["export", str(checkpoint / "wide"), "--text", str(checkpoint / "text.txt"), *QUICK]


@pytest.mark.parametrize("to", TARGETS)
def test_every_target(to, arguments, checkpoint, capsys):
    out = checkpoint / "out"
    assert main([*arguments, "--to", to, "--bits", BITS.get(to, "3.9"), "--output", str(out)]) == 0
    report = RunReport.load(out)
    assert report.settings["to"] == to and report.settings["score"] == "owl"
    assert LayerScores.load(out / "scores.json").values == report.layers["score"]
    names = {path.name for path in out.iterdir()}
    if to == "compressed-tensors":
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
        card = (out / "README.md").read_text()
        assert "compressed-tensors" in card and "This is a stock checkpoint" in card and "hf-cod export" in card
    else:
        assert not {"config.json", "README.md", "tokenizer.json"} & names and len(names) > 3
    assert f"in the format of {to}" in capsys.readouterr().out


def test_a_plan_and_scores_from_files(arguments, checkpoint, capsys):
    stack = find_decoder_layers(llama(hidden_size=128, num_key_value_heads=4))
    sizes = [stack.count_weights(i) for i in range(3)]
    LayerAllocation("bits", 3.5, [4.0, 3.0, 3.0], sizes, "owl", sizes=sizes).save(checkpoint / "allocation.json")
    LayerScores("m", "angular", [1.0, 2.0, 3.0], sizes).save(checkpoint / "scores.json")
    plan, scores = (["--" + name, str(checkpoint / f"{file}.json")] for name, file in PAIRS)
    more = ["--to", "gptqmodel", "--output", str(checkpoint / "one")]
    assert main([*arguments, *more, *plan]) == 0
    report = RunReport.load(checkpoint / "one")
    assert [report.layers["bits"][i] < report.layers["bits"][0] for i in (1, 2)] == [True, True]
    assert report.settings["score"] is None and not (checkpoint / "one" / "scores.json").exists()
    more = ["--to", "gptqmodel", "--output", str(checkpoint / "two")]
    assert main([*arguments, *more, *scores, "--bits", "3.6"]) == 0
    report = RunReport.load(checkpoint / "two")
    assert report.settings["score"] == "angular" and report.layers["bits"] == sorted(report.layers["bits"])
    bad = ["--output", str(checkpoint / "three")]
    cases = {
        "scores: expected none with a plan": [*plan, *scores],
        "bits: expected none with a plan": [*plan, "--bits", "3.3"],
        "score: expected none with scores": [*scores, "--score", "angular"],
        "plan: expected": ["--plan", str(checkpoint / "scores.json")],
        "bits: expected 2.125 to 8.125 stored bits a weight in the format of gptqmodel": [],
        "to: expected one of compressed-tensors": ["--to", "onnx"],
    }
    for said, words in cases.items():
        assert main([*arguments, "--to", "gptqmodel", *words, *bad, *([] if words else ["--bits", "12"])]) == 2
        shown = capsys.readouterr().err
        assert said.replace("2.125 to 8.125", "2.156 to 8.156") in shown, shown
    assert not (checkpoint / "three" / "report.json").exists()


def test_a_search(arguments, checkpoint, capsys):
    out = checkpoint / "out"
    search = [*arguments, "--to", "mlx", "--bits", "4.4", "--search", "--sequence-length", "8", "--max-samples", "4"]
    assert main([*search, "--passes", "40", "--output", str(out)]) == 0
    report = RunReport.load(out)
    assert report.settings["score"] == "search" and report.results["search"]["passes"] <= 40
    assert "The search found a plan" in capsys.readouterr().out and not (out / "scores.json").exists()
    for words, said in ((["--score", "angular"], "score: expected none with --search"), (["--gguf", "x"], "gguf: ")):
        assert main([*search, *words, "--output", str(checkpoint / "other")]) == 2
        assert said in capsys.readouterr().err


PAIRS = (("plan", "allocation"), ("scores", "scores"))


def test_an_export_to_vllm_resumes(arguments, checkpoint, monkeypatch):
    from hf_cod.compression.export import compressed_tensors

    out, save = checkpoint / "out", compressed_tensors._save
    words = [*arguments, "--bits", "3.8", "--output", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(compressed_tensors, "_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(words)
    assert len([*(out / "journal").glob("*.safetensors")]) == 3
    monkeypatch.setattr(compressed_tensors, "round_uniform", lambda *_: 1 / 0)
    assert main(words) == 0 and save is compressed_tensors._save
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not (out / "journal").exists()


def test_scores_of_another_tool(arguments, checkpoint, capsys):
    file = checkpoint / "scores.csv"
    file.write_text("".join(f"model.layers.{index},{value}\n" for index, value in enumerate((1, 3, 2))))
    more = ["--to", "gptqmodel", "--bits", "3.6", "--scores", str(file), "--output"]
    assert main([*arguments, *more, str(checkpoint / "out")]) == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["score"] == "table" and report.layers["score"] == [1.0, 3.0, 2.0]
    assert report.layers["bits"][0] <= report.layers["bits"][2] < report.layers["bits"][1]
    assert LayerScores.load(checkpoint / "out" / "scores.json").granularity == "module"
    file.write_text("model.layers.9,1\n")
    assert main([*arguments, *more, str(checkpoint / "bad")]) == 2
    assert "scores: expected modules of the model, got 1 of 1 that it does not have" in capsys.readouterr().err
