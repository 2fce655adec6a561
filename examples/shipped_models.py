"""Models that are part of the repository: copies their files and their cards to where the repository has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hf_cod.io.files import write_json

ROOT = Path(__file__).parent.parent
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def ship(made: Path, folder: Path) -> None:
    """Copies a released model to `folder`, without the code for the Hub, and its card to model_cards."""
    for target, patterns in ((folder, SHIPPED), (ROOT / "model_cards" / made.name, ("README.md", "*.png"))):
        target.mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in patterns for path in made.glob(pattern)):
            shutil.copy2(path, target)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # it names code files, which are not copied
    write_json(folder / "config.json", config)
