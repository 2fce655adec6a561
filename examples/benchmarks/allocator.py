"""Memory of torch's allocator, as reported by its profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch


def peak_added(profiler: torch.profiler.profile, cuda: bool = False) -> int:
    """Peak bytes in addition to those allocated before, from a profile with `profile_memory=True`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # Device type 0 is the CPU, 1 CUDA; each event has the total allocated after it.
    memory = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == int(cuda)]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before
