"""Files for MLX: sensitivities, by which mlx_lm.dynamic_quant chooses the same widths, and the entry of config.json.

mlx_lm.dynamic_quant gives the larger width to matrices above a threshold of sensitivity, so the sensitivities are 1 and
0. It quantizes the embedding and the head, too.
"""

from __future__ import annotations

from typing import Any

from hf_cod.compression.export.request import Request, Written
from hf_cod.compression.export.rules import most_common
from hf_cod.io.files import write_json

SENSITIVITIES, ENTRY = "sensitivities.json", "quantization.json"
WIDTHS = (2, 3, 4, 5, 6, 8)
SCALE_BITS = 32  # of a group: a scale and a bias in 16 bits each


def write(request: Request) -> Written:
    """Writes the files."""
    plan = request.plan
    widths = sorted(set(plan.widths.values()))
    low, high = widths[0], widths[-1]
    others = _others(request)
    values = {
        **{name: 1.0 if width == high else 0.0 for name, width in plan.widths.items()},
        **dict.fromkeys(others, 1.0),
    }
    if low == high:
        values = dict.fromkeys(values, 0.0)
    write_json(request.output / SENSITIVITIES, [[name, value] for name, value in values.items()])
    base = most_common(plan)
    quantization: dict[str, Any] = {"group_size": plan.group, "bits": base}
    quantization |= {n: {"group_size": plan.group, "bits": w} for n, w in plan.widths.items() if w != base}
    quantization |= dict.fromkeys(plan.left, False)
    write_json(request.output / ENTRY, {"quantization": quantization})
    told = "mlx_lm.convert -q" if low == high else "mlx_lm.dynamic_quant"
    if low == high:
        command = f"{told} --hf-path MODEL --q-bits {low} --q-group-size {plan.group}"
    else:
        groups = f"--low-group-size {plan.group} --high-group-size {plan.group}"
        command = (
            f"{told} --model MODEL --sensitivities {SENSITIVITIES} --low-bits {low} --high-bits {high} {groups} "
            f"--target-bpw {_target(request, high):.3f}"
        )
    notes = [] if len(widths) < 3 else [f"{ENTRY} has {len(widths)} widths, {SENSITIVITIES} only {low} and {high}"]
    left = [name for name in plan.left if name in dict(request.stack.model.named_modules())]
    if left and low != high:
        notes.append(f"mlx_lm.dynamic_quant also quantizes {len(left)} matrices that the plan leaves out")
    return Written([f"On a Mac: {command}"], notes)


def _others(request: Request) -> list[str]:
    """Modules outside of the layers that MLX quantizes, and matrices of the layers that the plan leaves out."""
    stack = request.stack
    names = {id(module): name for name, module in stack.model.named_modules()}
    embedding, head = stack.embeddings, stack.head
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    outside = [module for module in (embedding, None if tied else head) if module is not None]
    return [*(names[id(module)] for module in outside if id(module) in names), *(n for n in request.plan.left)]


def _target(request: Request, high: int) -> float:
    """Bits a weight of the model with this plan and the larger width for the others, between all other plans."""
    plan, model = request.plan, request.stack.model
    assert plan.group is not None
    extra = SCALE_BITS / plan.group
    sizes = {name: n * k for name, (n, k) in plan.sizes.items()}
    others: list[Any] = [model.get_submodule(name) for name in _others(request) if name in dict(model.named_modules())]
    outside = sum(module.weight.numel() for module in others)
    bits = sum(sizes[name] * (width + extra) for name, width in plan.widths.items()) + outside * (high + extra)
    return bits / (sum(sizes.values()) + outside)
