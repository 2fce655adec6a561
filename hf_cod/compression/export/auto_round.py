"""layer_config.json: the argument `layer_config` of AutoRound, module name -> settings."""

from __future__ import annotations

from hf_cod.compression.export.request import Request, Written
from hf_cod.compression.export.rules import most_common
from hf_cod.io.files import write_json

FILE = "layer_config.json"
WIDTHS = (2, 3, 4, 8)
UNQUANTIZED = 16


def write(request: Request) -> Written:
    """Writes the file."""
    plan = request.plan
    base = most_common(plan)
    config = {n: {"bits": w, "group_size": plan.group, "sym": True} for n, w in plan.widths.items() if w != base}
    modules = dict(request.stack.model.named_modules())
    config |= {name: {"bits": UNQUANTIZED} for name in plan.left if name in modules}
    write_json(request.output / FILE, config)
    return Written(
        [
            f"In Python: AutoRound(MODEL, bits={base}, group_size={plan.group}, sym=True, "
            f"layer_config=json.load(open('{FILE}'))), then quantize_and_save(directory)."
        ]
    )
