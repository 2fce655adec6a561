"""The command line: the table of commands; parse, call, exit.

Neither this nor `--help` of a command imports torch or transformers: commands import those where their work begins.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from wrapt import register_post_import_hook

from hf_cod.cli.messages import warnings_shown
from hf_cod.io.display import one_line

# Command -> (module in hf_cod.cli.commands, one line of help). A module is imported only when its command is called.
COMMANDS = {
    "demo": ("demo", "measure a small real model and show what its layers do"),
    "diagnose": ("diagnose", "measure what each layer of a model does"),
    "score": ("score", "measure how much each layer matters, for pruning and quantization"),
    "history": ("history", "draw what the layers did during a training"),
    "prune": ("prune", "set weights to zero, more in layers that matter less"),
    "factorize": ("factorize", "replace matrices by products of two thin ones: fewer weights, dense ones"),
    "narrow": ("narrow", "remove attention heads and MLP channels, more in layers that matter less"),
    "drop-layers": ("drop_layers", "remove the layers that a model misses least: fewer layers, a stock checkpoint"),
    "pack": ("pack", "store a pruned model without its zeros, to load and run it faster"),
    "quantize": ("quantize", "store a model in three and four bits, four where layers matter more"),
    "fit": ("fit", "make a model meet a budget of memory, parameters or bits by the best combination of these"),
    "heal": ("heal", "train a pruned, factorized, narrowed or shortened model to say what the original says"),
    "finetune": ("finetune", "train a model on, a few layers at a time"),
    "compare": ("compare", "put several diagnosed runs side by side"),
    "card": ("card", "write a pre-trained model with its model card, ready to share"),
    "convert": ("convert", "convert LayerNorm Scaling to stock checkpoints and back, and from the authors' code"),
    "env": ("env", "print versions and hardware, to paste into a bug report"),
}
# Commands that keep a journal or checkpoints: stopped, the same command resumes.
RESUMABLE = (
    "demo",
    "diagnose",
    "score",
    "prune",
    "factorize",
    "narrow",
    "drop-layers",
    "quantize",
    "fit",
    "heal",
    "finetune",
)

# Those of them that train.
FROM_CHECKPOINTS = ("heal", "finetune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure in the work, 2 for bad input, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from hf_cod._version import __version__

        print(f"hf-cod {__version__}")
        return 0
    if arguments[0] == "--print-completion":
        from hf_cod.cli.completion import print_completion

        return print_completion(arguments[1:], COMMANDS)
    if arguments[0] not in COMMANDS:
        print(f"hf-cod: expected one of {', '.join(COMMANDS)}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    """Runs a command; what it fails with is one line, and with `--debug` a traceback before it."""
    _quieten_transformers()
    command = importlib.import_module(f"hf_cod.cli.commands.{COMMANDS[name][0]}")
    try:
        asked = {"--help", "-h", "--print-config", "--print_config"}.intersection(arguments)
        quiet = _quiet() if "--quiet" in arguments and not asked else nullcontext()
        with quiet, warnings_shown(name):
            return command.main(arguments)
    except KeyboardInterrupt:
        resume = "; the same command resumes" if name in RESUMABLE else ""
        if name in FROM_CHECKPOINTS:
            resume = "; the same command resumes from its last checkpoint"
        print(f"hf-cod {name}: stopped{resume}", file=sys.stderr)
        return 130
    except Exception as error:
        status = _status_of(error)
        if status is None:  # a mistake of ours, which its traceback shows
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"hf-cod {name}: error: {one_line(error)}", file=sys.stderr)
        return status


def _status_of(error: Exception) -> int | None:
    """2 for bad input, 1 for what failed in the work: files, devices, memory; None for other errors."""
    if isinstance(error, ValueError | ImportError):
        return 2
    # SafetensorError by its name: nothing may have imported safetensors.
    failed = isinstance(error, OSError | RuntimeError | MemoryError) or type(error).__name__ == "SafetensorError"
    return 1 if failed else None


def _quieten_transformers() -> None:
    """Its loading reports and bars would bury our one line of error; a verbosity that the user has chosen stays.

    Takes effect when transformers is imported, which is later. Its own switch for bars would turn off the Hub's, too,
    by which ours go.
    """

    def quieten(logging: Any) -> None:
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()
        logging.set_tqdm_hook(lambda _, args, more: logging.EmptyTqdm(*args, **more))

    register_post_import_hook(quieten, "transformers.utils.logging")


@contextmanager
def _quiet() -> Iterator[None]:
    """`--quiet`: no tables and no progress bars, ours or other libraries'; errors are still printed."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown_before = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        if shown_before:
            enable_progress_bars()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-cod COMMAND [ARGUMENTS]",
            "",
            "See, cure and use the Curse of Depth.",
            "",
            "commands:",
            *rows,
            "",
            "hf-cod COMMAND --help describes a command, hf-cod --version prints the version, and",
            "hf-cod --print-completion SHELL a script that completes them in bash, zsh, fish and others.",
        ]
    )
