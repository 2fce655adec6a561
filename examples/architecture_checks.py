"""What `architectures.py` checks of each function on a model: each check can fail, and says in words what was excluded.

A check takes a function that builds the model, and returns a note or None. A difference that nobody was told of raises
`WrongResult`; a ValueError of the package is a refusal.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_cod import (
    OwlBnbConfig,
    OwLoreAdamW,
    OwLoreConfig,
    diagnose,
    drop,
    factorize,
    find_decoder_layers,
    narrow,
    prune,
    quantize,
    skip,
)
from hf_cod.layers.stacks import named_stacks

Builder = Callable[[], PreTrainedModel]
_IDS = torch.randint(5, 80, (3, 9), generator=torch.Generator().manual_seed(1))
# Two programs of one sum: experts and attention choose theirs by the shapes in a batch.
ROUNDING = 1e-5


class WrongResult(Exception):
    """A result that differs from the reference, without an error or a note."""


def batches_for(model: Any) -> list[dict[str, Tensor]]:
    """Two batches; those of an encoder-decoder also have tokens for the decoder, a few less than for the encoder."""
    ids = (_IDS, _IDS[:2] + 3)
    if not model.config.is_encoder_decoder:
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    read = [_read(model, each) for each in ids]
    return [
        {**inputs, "decoder_input_ids": each.flip(1)[:, :7].contiguous()}
        for inputs, each in zip(read, ids, strict=True)
    ]


def _read(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model, or its encoder, reads of one batch: tokens or sound."""
    if model.main_input_name == "input_ids":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    frames = 2 * getattr(model.config, "max_source_positions", 32)
    shape = (len(ids), getattr(model.config, "num_mel_bins", 8), frames)
    return {model.main_input_name: torch.randn(shape, generator=torch.Generator().manual_seed(2))}


def check_diagnosis(build: Builder) -> str | None:
    """Angles against hooks on the layers; the model is left as it was."""
    model = build()
    before, logits = copy.deepcopy(model.state_dict()), _logits(model)
    report = diagnose(model, batches=batches_for(model), show_progress=False)
    for index, expected in enumerate(_naive_angles(model)):
        got = report.layers["angular_distance"][index]
        _require(got is None or abs(got - expected) < 1e-3, f"angle of layer {index}: {got}, by hooks {expected:.4f}")
    for name, tensor in model.state_dict().items():
        _require(torch.equal(tensor, before[name]), f"{name} has changed")
    _same(_logits(model), logits, "the model after the diagnosis", 0)
    return None


def check_prune(build: Builder) -> str | None:
    """Zeros counted = promised; weights counted + excluded = all weights of the layers; a reload is equal."""
    model = build()
    stack = find_decoder_layers(model)
    report = prune(model, 0.5, "wanda", batches=batches_for(model))
    matrices = [weight for index in range(len(stack)) for _, weight in stack.matrices(index)]
    share = sum(int((W == 0).sum()) for W in matrices) / sum(W.numel() for W in matrices)
    _require(abs(share - 0.5) < 0.02, f"{share:.3f} of the weights are 0 instead of 0.5")
    _same(_logits(reloaded(model)), _logits(model), "reload", ROUNDING)
    return _excluded(stack, sum(W.numel() for W in matrices), report.notes)


def check_drop(build: Builder) -> str | None:
    """Skip = drop; generation with a cache = without; a reload is equal. Of several stacks, on each."""
    told = [_dropped(build, stack.name) for stack in named_stacks(build())] or [_dropped(build, None)]
    return next((note for note in told if note), None)


def _dropped(build: Builder, stack: str | None) -> str | None:
    for layers in (1,) if stack is None else (0, 1):
        model = build()
        with skip(model, layers, stack):
            skipped = _logits(model)
        drop(model, layers, stack)
        logits = _logits(model)
        _same(skipped, logits, "skip against drop", 0)
        _same(_logits(reloaded(model)), logits, "reload", ROUNDING)
    return _generates_alike(model, build())


def check_quantize(build: Builder) -> str | None:
    """Quantized = its own `dequantize()`; a reload is equal."""
    model = build()
    report = quantize(model, OwlBnbConfig(bits=4))
    logits = _logits(model)
    _same(_logits(reloaded(model)), logits, "reload", ROUNDING)
    dense: Any = copy.deepcopy(model).dequantize()
    _same(logits, _logits(dense), "dequantize()", 2e-2)
    return _first_of([note for note in report.notes if "not quantized" in note])


def check_factorize(build: Builder) -> str | None:
    """Factorized at full rank = intact; a reload is equal."""
    model = build()
    intact = _logits(model)
    factorize(model, 0.9, "plain")
    _same(_logits(reloaded(model)), _logits(model), "reload", ROUNDING)
    _require(not torch.equal(_logits(model), intact), "nothing has changed")
    return None


def check_narrow(build: Builder) -> str | None:
    """Fewer heads and channels = zeroed ones; a reload is equal; generation with a cache = without."""
    model = build()
    size = sum(p.numel() for p in model.parameters())
    narrow(model, 0.85, "magnitude", "none", channel_multiple=8)
    _require(sum(p.numel() for p in model.parameters()) < size, "no weight was removed")
    _same(_logits(model), _logits(_zeroed_as(model, build())), "the model with zeros", ROUNDING)
    model = build()
    report = narrow(model, 0.85, "fluctuation", batches=batches_for(model))
    _same(_logits(reloaded(model)), _logits(model), "reload", ROUNDING)
    _generates_alike(model, build())
    return _first_of([note for note in report.notes if "not narrowed" in note])


def check_owlore(build: Builder) -> str | None:
    """Layers that were not sampled are bit-equal, the sampled one has moved; also with gradient checkpointing."""
    moved = [_trained(build(), checkpointing) for checkpointing in (False, True)]
    for name in moved[0]:
        _same(moved[1][name], moved[0][name], f"{name} with gradient checkpointing", 1e-3)
    return None


def check_adapter(build: Builder) -> str | None:
    """OwLore adapters: one step of training moves the outputs, the base stays bit-equal."""
    from peft import get_peft_model

    base = build()
    before, logits = copy.deepcopy(base.state_dict()), _logits(base)
    # PEFT's class of a task names the inputs that it passes on.
    task = None if base.config.is_encoder_decoder else "CAUSAL_LM"
    model: Any = get_peft_model(base, OwLoreConfig(r=4, task_type=task))
    optimizer = OwLoreAdamW(model, lr=1e-1, n_active=2)
    _step(model, optimizer, 2)
    _require(not torch.equal(_logits(model.eval()), logits), "the outputs have not moved")
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in before.items():
        _require(torch.equal(plain[name], tensor), f"{name} of the base has moved")
    return None


# Column of the table -> check.
CHECKS: dict[str, Callable[[Builder], str | None]] = {
    "diagnose": check_diagnosis,
    "prune": check_prune,
    "drop": check_drop,
    "quantize": check_quantize,
    "factorize": check_factorize,
    "narrow": check_narrow,
    "owlore": check_owlore,
    "adapter": check_adapter,
}


def reloaded(model: Any) -> PreTrainedModel:
    """The model as written and read again."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory).eval()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(**batches_for(model)[0]).logits


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def _same(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    difference = _distance(got, expected)
    _require(difference <= tolerance, f"{what} differs by {difference:.1e}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongResult(otherwise)


def _first_of(notes: list[str]) -> str | None:
    return f"{len(notes)} notes, such as: {notes[0]}" if notes else None


def _excluded(stack: Any, counted: int, notes: list[str]) -> str | None:
    """How many weights of the layers no method reaches; it must stand in the notes of the report."""
    whole = sum(p.numel() for layer in stack for p in layer.parameters() if p.dim() > 1)
    if counted == whole:
        return None
    return f"{whole - counted:,} of {whole:,} weights of the layers are in no matrix; notes: {notes or 'none'}"


@torch.no_grad()
def _zeroed_as(narrower: Any, intact: Any) -> Any:
    """The intact model with zeros for the rows and columns of its matrices that the narrower one lacks."""
    smaller = dict(narrower.named_parameters())
    for name, weight in intact.named_parameters():
        left = smaller[name]
        if weight.dim() != 2 or left.shape == weight.shape:
            continue
        cut = 0 if left.shape[0] != weight.shape[0] else 1
        here, there = weight.movedim(cut, 0), left.movedim(cut, 0)
        rows = {row.numpy().tobytes() for row in there}
        kept = torch.tensor([row.numpy().tobytes() in rows for row in here])
        _require(int(kept.sum()) == len(there), f"{name} has other rows than the intact matrix")
        here[~kept] = 0
        module = intact.get_submodule(name.rpartition(".")[0])
        if module.bias is not None and cut == int(isinstance(module, Conv1D)):
            module.bias[~kept] = 0
    return intact


def _naive_angles(model: Any) -> list[float]:
    """Mean angle between input and output of each layer at the last token, in units of pi."""
    stack = find_decoder_layers(model)
    angles: list[list[Tensor]] = [[] for _ in stack]

    def hook(index: int) -> Any:
        def measure(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            if x.dim() == 4 and x.shape[2] == _IDS.shape[1]:  # streams first, as of Gemma 3n
                x, y = x.movedim(0, 2), y.movedim(0, 2)
            cosine = F.cosine_similarity(x.double().flatten(2)[:, -1], y.double().flatten(2)[:, -1], dim=-1)
            angles[index].append(torch.arccos(cosine.clamp(-1, 1)) / torch.pi)

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for batch in batches_for(model):
            with torch.no_grad():
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(found).mean()) if found else 0.0 for found in angles]


def _generates_alike(model: Any, intact: Any) -> str | None:
    """Greedy generation with and without a cache, where the intact model gives the same with both."""
    if not isinstance(model, GenerationMixin) or not model.can_generate():
        return "no generation"
    if _distance(_generated(intact, True), _generated(intact, False)) > ROUNDING:
        return "the intact model generates otherwise with a cache"
    _require(
        _distance(_generated(model, True), _generated(model, False)) <= ROUNDING, "generation with a cache differs"
    )
    return None


@torch.no_grad()
def _generated(model: Any, use_cache: bool) -> Tensor:
    """The logits of each generated token."""
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    told = {"output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**_read(model, _IDS[:1]), use_cache=use_cache, **settings, **told).logits)


def _trained(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    """What two steps of OwLore with one sampled layer have moved: name -> change."""
    stack = find_decoder_layers(model)
    if checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model, OwLoreAdamW(model, lr=1e-2, n_active=1, rank=4, interval=100), 2)
    moved = {
        name: p.detach() - before[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    layers = {stack.index_of(name) for name in moved} - {None}
    _require(len(layers) == 1, f"layers {sorted(layers)} have moved instead of one")
    return moved


def _step(model: Any, optimizer: Any, steps: int) -> None:
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for _ in range(steps):
        batch = batches_for(model)[0]
        model(**batch, labels=batch.get("decoder_input_ids", _IDS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
