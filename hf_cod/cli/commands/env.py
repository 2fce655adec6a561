"""hf-cod env: versions and hardware, for bug reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hf_cod._version import __version__
from hf_cod.cli.parser import SettingsParser

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "peft",
    "trl",
    "bitsandbytes",
    "triton",
    "datasets",
    "evaluate",
    "lm_eval",
    "gguf",
    "matplotlib",
)


def make_parser() -> SettingsParser:
    """The command's options."""
    return SettingsParser(
        prog="hf-cod env", description="Prints versions and hardware, for bug reports. Nothing is sent."
    )


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    make_parser().parse(arguments)
    for name, value in environment().items():
        print(f"- {name}: {value}")
    return 0


def environment() -> dict[str, str]:
    """Name -> version or description."""
    import psutil
    import torch

    found = {"hf_cod": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    found["cpu"] = (
        f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    found["memory"] = f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found["gpu"] = ", ".join(devices) + f" (CUDA {torch.version.cuda})" if devices else "none"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
