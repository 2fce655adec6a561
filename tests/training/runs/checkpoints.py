"""Checkpoints as Trainer leaves them, of any step."""

import json
import shutil

from tests.earlier_files.read import FILES

MARKER = "trainer_state.json"
SOURCE = FILES / "0.1" / "runs" / "finetune" / "checkpoint-2"


def whole_checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    shutil.copytree(SOURCE, path)
    state = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps({**state, "global_step": step}))
    return path
