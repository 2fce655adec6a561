"""quantize_config.json of GPTQModel: bits of most matrices, and the others by rules in `dynamic`.

A rule "+:EXPRESSION" overrides settings of the modules whose whole names match, "-:EXPRESSION" leaves them unquantized.
"""

from __future__ import annotations

from hf_cod.compression.export.request import Request, Written, by_width
from hf_cod.compression.export.rules import expressions, most_common
from hf_cod.io.files import write_json

FILE = "quantize_config.json"
WIDTHS = (2, 3, 4, 8)


def write(request: Request) -> Written:
    """Writes the file."""
    plan = request.plan
    base = most_common(plan)
    dynamic: dict[str, dict[str, int]] = {}
    for width, names in by_width(plan.widths).items():
        if width != base:
            dynamic |= {f"+:{rule}": {"bits": width} for rule in expressions(names)}
    left = [name for name in plan.left if name in dict(request.stack.model.named_modules())]
    dynamic |= {f"-:{rule}": {} for rule in expressions(left)}
    config = {
        "bits": base,
        "group_size": plan.group,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": dynamic,
    }
    write_json(request.output / FILE, config)
    return Written(
        [
            f"In Python, in this directory: model = GPTQModel.load(MODEL, QuantizeConfig.from_pretrained('.')), then "
            f"model.quantize(texts) and model.save(directory); {FILE} has the widths."
        ]
    )
