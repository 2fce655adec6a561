"""What `architectures.py` checks of `score_layers`: several methods, two of them against naive formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from architecture_comparison import Remark, is_refusal, require, unchanged_if_refused
from architecture_inputs import batches_for, labels
from architecture_references import naive_angles
from tiny_architectures import Case

from hf_cod import find_decoder_layers, score_layers

# Those of one pass, or none: the others remove or prune layers, which have checks of their own.
METHODS = ("owl", "angular", "block_influence", "gradient_norm", "fisher", "weight_norm")
# Above this multiple of the mean some layers of each tiny model have outliers; few have them above the default.
OUTLIERS = 2.0


def check_score(case: Case) -> str | None:
    """One finite value for each layer, not all equal, by owl, angular, block_influence, gradient_norm, fisher and
    weight_norm; angles are those of hooks, weight_norm is the mean by hand; the model is left as it was. Works if one
    method does.
    """
    model = case.build()
    before = copy.deepcopy(model.state_dict())
    refusals: dict[str, ValueError] = {}
    for method in METHODS:
        try:
            with unchanged_if_refused(model):
                _check_method(case, model, method)
        except ValueError as error:
            if not is_refusal(error):
                raise
            refusals[method] = error
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, before[name]), f"{name} has changed")
    if len(refusals) == len(METHODS):
        raise refusals[METHODS[0]]
    return Remark("; ".join(f"{method} is refused: {error}" for method, error in refusals.items())) or None


def _check_method(case: Case, model: Any, method: str) -> None:
    batches = [batch | labels(case, model, batch) for batch in batches_for(case, model)]
    given: dict[str, Any] = {} if method == "weight_norm" else {"batches": batches}
    if method == "owl":
        given["threshold"] = OUTLIERS
    stack = find_decoder_layers(model, case.stack)
    values = score_layers(model, method=method, layers_path=case.stack, **given).values
    require(len(values) == len(stack), f"{method} has {len(values)} values for {len(stack)} layers")
    require(all(map(math.isfinite, values)), f"{method} is not finite: {values}")
    require(len({*values}) > 1 or len(stack) == 1, f"{method} is equal in all layers: {values}")
    expected = _expected(case, model, method)
    for index, (got, wanted) in enumerate(zip(values, expected or values, strict=True)):
        alike = abs(got - (wanted or 0.0)) <= 1e-3  # 0 for a layer that did not run
        require(alike, f"{method} of layer {index}: {got}, by hand {wanted}")


def _expected(case: Case, model: Any, method: str) -> list[float | None] | None:
    """The scores by a naive formula; None: there is none."""
    if method == "angular":
        return naive_angles(case, model)
    if method != "weight_norm":
        return None
    stack = find_decoder_layers(model, case.stack)
    found: list[float | None] = []
    for index in range(len(stack)):
        absolute = torch.cat([W.detach().abs().flatten().double() for _, W in stack.matrices(index)])
        found.append(float(absolute.mean()))
    return found
