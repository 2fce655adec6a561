"""On a GPU the public functions find what they find on the CPU. Skipped where there is none.

Models are float32 and small; products are computed in float32 on both, so that only their order differs.
"""

import peft
import pytest
import torch
from torch import nn

from hf_cod import (
    HealSettings,
    OwlBnbConfig,
    OwLoreAdamW,
    allocate,
    apply_steps,
    collect_statistics,
    diagnose,
    drop_experts,
    drop_layers,
    factorize,
    heal,
    narrow,
    pack_sparse,
    perplexity,
    plan_depth,
    plan_fit,
    plan_ranks,
    prune,
    quantize,
    score_layers,
)
from hf_cod.analysis.monitoring.monitor import LayerMonitor
from hf_cod.compression.fit.knobs import Applying
from hf_cod.io.models import ModelSettings, embedded_model, load_model
from hf_cod.io.text import SampleSettings, embedded_text, split_samples, token_batches
from hf_cod.scoring.methods import METHODS as SCORES
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.memory import train_steps
from hf_cod.training.runs.methods import METHODS as TRAINED_BY
from hf_cod.training.runs.methods import set_up
from tests.compression.quantization.test_experts import mixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")
CLOSE = 5e-3  # of perplexities: which of two near codes or weights is taken may differ


def load(device: str) -> nn.Module:
    return load_model(embedded_model("lns"), ModelSettings(dtype="float32", device=device))[0]


@pytest.fixture(scope="module")
def batches():
    """On the CPU, whatever device the model is on."""
    tokenizer = load_model(embedded_model("lns"))[1]
    return split_samples(token_batches(tokenizer, embedded_text(), SampleSettings(64, 12, 2)), 8)


def both(make):
    """What `make(model)` gives on each device."""
    return [make(load(device)) for device in DEVICES]


def assert_as_good(change, batches):
    """The changed model has the same perplexity on both devices."""

    def after(model):
        change(model)
        assert all(p.device.type == next(model.parameters()).device.type for p in model.parameters())
        return perplexity(model, batches[1])

    cpu, cuda = both(after)
    assert cuda == pytest.approx(cpu, rel=CLOSE)


def test_the_diagnosis(batches):
    cpu, cuda = both(lambda model: diagnose(model, batches=batches[0], show_progress=False))
    for name, values in cpu.layers.items():
        if all(isinstance(value, float) for value in values):
            assert cuda.layers[name] == pytest.approx(values, rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize("method", [name for name in SCORES if name not in ("sensitivity", "kl", "auto")])
def test_scores(method, batches):
    cpu, cuda = both(lambda model: score_layers(model, method=method, batches=batches[0]))
    assert cuda.values == pytest.approx(cpu.values, rel=1e-2, abs=1e-4)


def test_automatic_scores(batches):
    scores = score_layers(load("cuda"), method="auto", batches=batches[0])
    assert len(scores.values) == 12


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_pruning_and_the_sparse_format(method, batches):
    def change(model):
        scores = score_layers(model, collect_statistics(model, batches[0]))
        prune(model, allocate(scores, budget=0.6), method, batches=batches[0])
        pack_sparse(model)

    assert_as_good(change, batches)


@pytest.mark.parametrize("compensated", [False, True])
def test_quantization(compensated, batches):
    def change(model):
        scores = score_layers(model, batches=batches[0])
        statistics = None if compensated else collect_statistics(model, batches[0])
        quantize(model, OwlBnbConfig(scores=scores, statistics=statistics), batches=batches[0] if compensated else None)

    assert_as_good(change, batches)


def test_a_quantized_model_says_one_token_after_another_as_its_dense_copy(batches):
    for dtype, close in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        model = load("cuda").to(dtype)
        quantize(model)
        ids = batches[1][0]["input_ids"].cuda()
        with torch.no_grad():
            whole = model(ids[:1]).logits[:, -1].float()
            past = model(ids[:1, :-1], use_cache=True).past_key_values
            one = model(ids[:1, -1:], past_key_values=past).logits[:, -1].float()
        assert float((one - whole).norm() / whole.norm()) < close, dtype
        assert model.generate(ids[:1], max_new_tokens=8, min_new_tokens=8).shape == (1, ids.shape[1] + 8)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("tokens", [1, 40, 512])
@torch.no_grad()
def test_quantized_experts(kind, tokens):
    """Of both widths, in all implementations; one token, and prompts that fill a tile of the kernel or several."""
    model = mixture(kind)
    quantize(model, OwlBnbConfig(bits=3.6, block=32))
    ids = torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    model.cuda()
    for name in ("grouped_mm", "batched_mm", "eager") if kind != "llama4_text" else ("eager",):
        if kind != "llama4_text":
            model.set_experts_implementation(name)
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_all_experts_in_one_launch(dtype, monkeypatch):
    """The grouped kernel, against the experts one after another."""
    model = mixture("mixtral").to("cuda", dtype)
    quantize(model, OwlBnbConfig(bits=3.6, block=64))
    model.set_experts_implementation("grouped_mm")
    for tokens in (1, 7, 300):
        ids = torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()
        found = model(ids).logits.float()
        with monkeypatch.context() as patch:
            patch.setattr("hf_cod.compression.quantization.experts.has_grouped_kernel", lambda tokens: False)
            expected = model(ids).logits.float()
        close = 1e-4 if dtype == torch.float32 else 5e-2  # halves: a token may be routed otherwise
        assert float((found - expected).norm() / expected.norm()) < close


def test_experts_quantized_on_the_gpu():
    """Packed from weights on the GPU, with error compensation by tokens on it; saved and moved, it stays the same."""
    ids = torch.randint(3, 99, (8, 40), generator=torch.Generator().manual_seed(0))
    losses = []
    for device in DEVICES:
        model = mixture("mixtral").to(device)
        report = quantize(model, OwlBnbConfig(bits=3.6, block=32), batches=[{"input_ids": ids}])
        assert all(t.device.type == device for t in model.state_dict().values())
        with torch.no_grad():
            losses.append(float(model(ids.to(device), labels=ids.to(device)).loss))
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE) and report.results["bits"] < 3.7


@pytest.mark.parametrize("merge", [False, True])
@torch.no_grad()
def test_dropped_experts(merge):
    ids = torch.randint(3, 99, (8, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for device in DEVICES:
        model = mixture("mixtral").to(device)
        report = drop_experts(model, 0.5, batches=[{"input_ids": ids}], merge=merge)
        logits.append((model(ids.to(device)).logits.cpu(), report.results["removed_experts"]))
    (cpu, removed), (cuda, also) = logits
    assert also == removed
    torch.testing.assert_close(cuda, cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["lora", "owlore-peft", "owlore"])
def test_trained_banks(method):
    """Adapters on banks, and low-rank training of them."""
    ids = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(0))
    falls = []
    for device in DEVICES:
        model = mixture("mixtral").to(device)
        batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
        torch.manual_seed(0)
        trained, optimizer = set_up(method, model, None, OwLoreSettings(n_active=4, interval=5, rank=4), 1e-3, 4)
        before = float(trained(**batch).loss)
        train_steps(trained, optimizer, batch, steps=5)
        falls.append(before - float(trained.eval()(**batch).loss))
    assert falls[1] > 0 and falls[1] == pytest.approx(falls[0], rel=0.2)


def test_adapters_beside_packed_experts():
    """Gradients pass the packed banks, expert by expert."""
    model = mixture("mixtral").cuda()
    quantize(model, OwlBnbConfig(bits=3.6, block=32))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    ids = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(0)).cuda()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    before = float(adapted(input_ids=ids, labels=ids).loss)
    train_steps(adapted, optimizer, {"input_ids": ids, "labels": ids}, steps=3)
    assert float(adapted.eval()(input_ids=ids, labels=ids).loss) < before


@pytest.mark.parametrize("method", ["whitened", "plain", "oats"])
def test_low_rank(method, batches):
    def change(model):
        share = method == "oats"
        plan = 0.7 if share else plan_ranks(model, 0.7, batches=batches[0] if method == "whitened" else None)
        factorize(model, plan, method, batches=batches[0])

    assert_as_good(change, batches)


@pytest.mark.parametrize("method", ["fluctuation", "taylor", "magnitude"])
@pytest.mark.parametrize("compensation", ["least_squares", "bias", "none"])
def test_width(method, compensation, batches):
    assert_as_good(lambda model: narrow(model, 0.7, method, compensation, batches=batches[0]), batches)


@pytest.mark.parametrize("criterion", ["layer_drop", "block_influence", "angular", "search"])
def test_depth(criterion, batches):
    def change(model):
        drop_layers(model, plan_depth(model, 3, criterion, batches=batches[0], search_width=2), batches=batches[0])

    assert_as_good(change, batches)


def test_depth_with_maps_in_place_of_layers(batches):
    assert_as_good(lambda model: drop_layers(model, [4, 7], "measured", batches=batches[0]), batches)


@pytest.mark.parametrize("method", list(TRAINED_BY))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps(method, checkpointing, batches):
    """Projected methods meet bases that each device draws its own way: their loss falls as far, to a tenth."""
    ids = torch.cat([batch["input_ids"] for batch in batches[0]])

    def train(model):
        device = next(model.parameters()).device
        batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        trained, optimizer = set_up(method, model, None, OwLoreSettings(n_active=4, interval=5, rank=16), 1e-3, 8)
        before = float(trained(**batch).loss)
        train_steps(trained, optimizer, batch, steps=10)
        return before - float(trained.eval()(**batch).loss)

    cpu, cuda = both(train)
    assert cuda > 0 and cuda == pytest.approx(cpu, rel=0.1)


def test_bfloat16_weights_rounded_stochastically(batches):
    model = load("cuda").to(torch.bfloat16)
    ids = torch.cat([batch["input_ids"] for batch in batches[0]]).cuda()
    batch = {"input_ids": ids, "labels": ids}
    before = float(model(**batch).loss)
    train_steps(model, OwLoreAdamW(model, n_active=12, rank=16, interval=5, lr=1e-4), batch, steps=10)
    assert float(model.eval()(**batch).loss) < before


@pytest.mark.parametrize("method", ["owlore", "full", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_healing(method, bf16, batches):
    data = torch.cat([batch["input_ids"] for batch in batches[0]]).repeat(8, 1)
    held_out = torch.cat([batch["input_ids"] for batch in batches[1]])

    def after(device, **options):
        teacher, student = load(device), load(device)
        narrow(student, 0.6, batches=batches[0])
        settings = HealSettings(
            method, steps=30, batch_size=8, sequence_length=64, learning_rate=1e-3, eval_samples=4, **options
        )
        found = heal(student, teacher, data, settings, held_out=held_out).results
        assert found["training_memory"]["used_bytes"] > 0
        return found["perplexity"]["after"]

    # autocast rounds in other places on each device
    assert after("cuda", bf16=bf16) == pytest.approx(after("cpu"), rel=2e-2 if bf16 else CLOSE)


def test_a_plan_of_steps(batches):
    plan = plan_fit(lambda: load("cuda"), "parameter_share", 0.8, *batches, knobs=["depth", "rank"], n_verified=1)
    model = load("cuda")
    apply_steps(model, plan.steps, Applying(batches[0]))
    assert perplexity(model, batches[1]) < 1000


def test_a_monitor_of_a_training(batches):
    line = LayerMonitor(load("cuda"), batches[1]).probe(0)
    assert line is not None and len(line["variance"]) == 12
