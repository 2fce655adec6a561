"""How the checks of `architectures.py` compare results, and what each of them may end in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architecture_inputs import batches_for
from architecture_reload import reloaded_outputs
from tiny_architectures import Case
from torch import Tensor

# Two programs of one sum: experts and attention choose theirs by the shapes in a batch.
ROUNDING = 1e-5


class WrongResult(Exception):
    """A result that differs from the reference, without an error or a note."""


class Remark(str):
    """A note on what works: nothing is excluded."""


def is_refusal(error: ValueError) -> bool:
    """Whether an error is one of this package, which says what was expected; else it is that of another library."""
    return re.match(r"[a-z_]+: .*\bexpected\b", " ".join(str(error).split())) is not None


def require(condition: bool, otherwise: str) -> None:
    """Raises WrongResult if `condition` is false."""
    if not condition:
        raise WrongResult(otherwise)


def same(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Requires that the largest difference is within this share of the largest expected value."""
    require(got.shape == expected.shape, f"{what} has {tuple(got.shape)} values instead of {tuple(expected.shape)}")
    difference = distance(got, expected)
    require(difference <= tolerance, f"{what} differs by {difference:.1e}")


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    if not expected.numel():
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def outputs_of(case: Case, model: Any) -> Tensor:
    """The outputs of a model on its first batch."""
    return outputs(model, batches_for(case, model)[0])


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What a model outputs, as one vector: logits, the embeddings of two towers, or the last hidden state."""
    return main_output(model(**batch))


def main_output(found: Any) -> Tensor:
    """The same of the output of forward."""
    for names in (["logits"], ["text_embeds", "image_embeds"], ["last_hidden_state"]):
        tensors = [found.get(name) for name in names]
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            return torch.cat([tensor.flatten().float() for tensor in tensors])
    return next(t for t in found.values() if isinstance(t, Tensor) and t.is_floating_point()).flatten().float()


@contextmanager
def unchanged_if_refused(model: Any) -> Iterator[None]:
    """Requires that a model is as it was before if the block raises ValueError: weights, buffers, modules, configs."""
    before = _described(model)
    tensors = {name: tensor.clone() for name, tensor in _tensors(model)}
    try:
        yield
    except ValueError as error:
        after, why = _described(model), f"after the refusal ({' '.join(str(error).split())[:100]})"
        for name, value in before.items():
            require(after.get(name) == value, f"{name} has changed {why}: {value} is now {after.get(name)}"[:400])
        require(after.keys() == before.keys(), f"{sorted(after.keys() - before.keys())[:3]} are new {why}")
        for name, tensor in _tensors(model):
            require(torch.equal(tensor, tensors[name]), f"{name} has changed {why}")
        raise


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _described(model: Any) -> dict[str, Any]:
    """Shape and flag of each tensor; class, mode, hooks and plain attributes of each module; each config."""
    found: dict[str, Any] = {name: (t.shape, t.dtype, t.requires_grad) for name, t in _tensors(model)}
    configs: set[int] = set()
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        hooks = [len(vars(module)[f"_forward{kind}_hooks"]) for kind in ("", "_pre")]
        found[f"module {name}"] = (type(module), hooks, own)
        config = vars(module).get("config")
        if hasattr(config, "to_dict") and id(config) not in configs:
            configs.add(id(config))
            found[f"config of {name}"] = config.to_dict()
    return found


def check_reload(case: Case, model: Any) -> None:
    """Requires that a new process that loads the saved model gets the same outputs."""
    batch = batches_for(case, model)[0]
    same(reloaded_outputs(model, case.auto_class, batch, outputs), outputs(model, batch), "reload", ROUNDING)
