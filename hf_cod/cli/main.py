"""The command line: the table of commands; parses, calls a command, returns the exit status.

Neither this module nor `--help` of a command imports torch or transformers; commands import them after parsing.
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
from hf_cod.io.arguments import did_you_mean
from hf_cod.io.display import first_line, one_line
from hf_cod.io.interruption import Interruptions, Terminated

# Command -> (module in hf_cod.cli.commands, one line of help). A module is imported only when its command is called.
COMMANDS = {
    "demo": ("demo", "measure the layers of small models without any preparation"),
    "diagnose": ("diagnose", "measure the contribution of each layer of a model"),
    "score": ("score", "score the importance of each layer, for pruning, quantization and sampling"),
    "history": ("history", "plot the layer measurements of a training run"),
    "prune": ("prune", "set weights to zero, more in less important layers"),
    "factorize": ("factorize", "replace matrices by low-rank factors: fewer weights, all dense"),
    "narrow": ("narrow", "remove attention heads and MLP channels, more in less important layers"),
    "drop-layers": ("drop_layers", "remove the least important layers; a stock model remains a stock checkpoint"),
    "repeat-layers": ("repeat_layers", "run a block of layers several times; a stock model becomes a deeper one"),
    "drop-experts": ("drop_experts", "remove or merge the least important experts of a mixture of experts"),
    "pack": ("pack", "store a pruned model without its zeros, for faster loading and generation"),
    "quantize": ("quantize", "quantize a model to three and four bits, four in more important layers"),
    "export": ("export", "quantize a model for another engine: vLLM, llama.cpp, GPTQModel, AutoRound, MLX, ExLlamaV3"),
    "fit": ("fit", "compress a model to a budget of memory, parameters or bits by the best combination of methods"),
    "heal": ("heal", "train a compressed model to match the original model (distillation)"),
    "finetune": ("finetune", "fine-tune a model, a few layers at a time"),
    "compare": ("compare", "compare several diagnosed runs"),
    "report": ("report", "show a finished run again, also as an interactive page"),
    "card": ("card", "write the model card of a compressed, trained or pre-trained model"),
    "convert": ("convert", "convert between LayerNorm Scaling and stock checkpoints, and from the authors' code"),
    "env": ("env", "print versions and hardware, for bug reports"),
}
# Commands that keep a journal or checkpoints: after an interruption the same command resumes.
RESUMABLE = (
    "demo",
    "diagnose",
    "score",
    "prune",
    "factorize",
    "narrow",
    "drop-layers",
    "repeat-layers",
    "quantize",
    "export",
    "fit",
    "heal",
    "finetune",
)

# Commands of which a user needs one to make a model smaller.
COMPRESSING = ("fit", "quantize", "drop-layers", "drop-experts", "narrow", "factorize", "prune", "pack", "export")

# Options without a command.
_ALONE = ("--help", "--version", "--print-completion")

# Commands that train and resume from checkpoints.
FROM_CHECKPOINTS = ("heal", "finetune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    It is 0, 1 for a failure during the run, 2 for bad input, 130 after Ctrl-C, and 143 after SIGTERM.
    """
    try:
        try:
            return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except OSError as error:  # of standard output
        if not isinstance(error, BrokenPipeError):  # by which its reader, such as head, says that it has enough
            print(f"hf-cod: error: {first_line(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return 1


def _dispatch(arguments: list[str]) -> int:
    alone = arguments[0].replace("_", "-") if arguments and arguments[0].startswith("--") else None
    if not arguments or arguments[0] == "-h" or alone == "--help":
        print(_overview())
        return 0
    if alone == "--version":
        from hf_cod._version import __version__

        print(f"hf-cod {__version__}")
        return 0
    if alone == "--print-completion":
        from hf_cod.cli.completion import print_completion

        return print_completion(arguments[1:], COMMANDS)
    if arguments[0] not in COMMANDS:
        near = did_you_mean(arguments[:1], [*COMMANDS, *_ALONE])
        expected = f"{near and near + ' '}expected one of {', '.join(COMMANDS)}"
        print(f"hf-cod: {expected}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    """Runs a command; prints an error as one line, after a traceback with `--debug`."""
    _quieten_libraries()
    command = importlib.import_module(f"hf_cod.cli.commands.{COMMANDS[name][0]}")
    interruptions = Interruptions()
    try:
        asked = {"--help", "-h", "--print-config", "--print_config"}.intersection(arguments)
        quiet = _quiet() if "--quiet" in arguments and not asked else nullcontext()
        with quiet, warnings_shown(name), interruptions.raised():
            return command.main(arguments)
    except (KeyboardInterrupt, Exception) as error:
        stop = interruptions.behind(error)
        if stop is not None:
            return _stopped(name, stop)
        status = _status_of(error)
        if status is None:  # a bug in hf_cod: shown with its traceback
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        # Of a failure in the work the first line: what follows are torch's own traces.
        said = one_line(error) if status == 2 else first_line(error)
        print(f"hf-cod {name}: error: {said}", file=sys.stderr)
        return status


def _stopped(name: str, stop: KeyboardInterrupt) -> int:
    resume = "; the same command resumes" if name in RESUMABLE else ""
    if name in FROM_CHECKPOINTS:
        resume = "; the same command resumes from its last checkpoint, or begins again if there is none"
    print(f"hf-cod {name}: stopped{resume}", file=sys.stderr)
    return 143 if isinstance(stop, Terminated) else 130


def _status_of(error: BaseException) -> int | None:
    """2 for bad input, 1 for failures during the run (files, devices, memory), None for other errors."""
    if isinstance(error, ValueError | ImportError):
        return 2
    # SafetensorError is compared by name, since safetensors may not be imported.
    failed = isinstance(error, OSError | RuntimeError | MemoryError) or type(error).__name__ == "SafetensorError"
    return 1 if failed else None


def _quieten_libraries() -> None:
    """Silences the progress bars of transformers and datasets, transformers' loading reports, and what datasets logs
    before it raises the same as an error, unless the user has set TRANSFORMERS_VERBOSITY or DATASETS_VERBOSITY.

    They would hide our one-line errors. This takes effect when the libraries are imported, which is later. The switch
    of transformers for progress bars is not used: it would also turn off those of huggingface_hub, which control ours.
    """

    def quieten(logging: Any) -> None:
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()
        logging.set_tqdm_hook(lambda _, args, more: logging.EmptyTqdm(*args, **more))

    def quieten_datasets(logging: Any) -> None:
        if "DATASETS_VERBOSITY" not in os.environ:
            logging.set_verbosity(logging.CRITICAL)

    register_post_import_hook(quieten, "transformers.utils.logging")
    register_post_import_hook(quieten_datasets, "datasets.utils.logging")
    register_post_import_hook(lambda module: module.disable_progress_bars(), "datasets.utils.tqdm")


@contextmanager
def _quiet() -> Iterator[None]:
    """`--quiet`: no tables and no progress bars, of hf_cod or other libraries; errors are still printed."""
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
            "Layer-wise diagnosis, compression and training of transformers models.",
            "",
            "commands:",
            *rows,
            "",
            f"Commands that compress: {', '.join(COMPRESSING)}.",
            "If you do not know which one you need, use fit with a budget: it measures the methods on your model, and",
            "applies the best combination.",
            "",
            "hf-cod COMMAND --help describes a command, hf-cod --version prints the version, and",
            "hf-cod --print-completion SHELL prints a completion script for bash, zsh, fish and others.",
        ]
    )
