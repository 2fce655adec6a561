"""override.yaml for recompile.py of ExLlamaV3, which puts one model together from several of one width each."""

from __future__ import annotations

from hf_cod.compression.export.request import Request, Written, by_width
from hf_cod.compression.export.rules import most_common
from hf_cod.io.files import write_text

FILE = "override.yaml"
WIDTHS = (2, 3, 4, 5, 6, 8)


def stored(size: tuple[int, int], width: int, group: int | None, scale_bits: int) -> int:
    """The number of bits of a matrix: its codes, and a sign or scale of 16 bits for each row and column."""
    return size[0] * size[1] * width + 16 * (size[0] + size[1])


def reason(size: tuple[int, int], group: int | None) -> str | None:
    """Why a matrix cannot be quantized; None if it can."""
    return f"its shape {size} is no multiple of 128" if size[0] % 128 or size[1] % 128 else None


def write(request: Request) -> Written:
    """Writes the file."""
    plan = request.plan
    base = most_common(plan)
    others = {width: names for width, names in by_width(plan.widths).items() if width != base}
    text = "sources:\n" + "".join(f"  - id: {width}\n    model_dir: exl3-{width}bpw\n" for width in others)
    text += "overrides:\n"
    for width, names in others.items():
        text += "".join(f'  - key: "{name}.*"\n    source: {width}\n' for name in names)
    if not others:
        text = "sources: []\noverrides: []\n"
    write_text(request.output / FILE, text)
    made = " and ".join(f"exl3-{width}bpw" for width in (base, *others))
    return Written(
        [
            f"With ExLlamaV3, quantize MODEL by convert.py to {made} (-b {base} and so on), then in this directory: "
            f"python recompile.py -i exl3-{base}bpw -o model-exl3 -or {FILE}"
        ]
    )
