"""Each function of the package on a tiny random model of every architecture of transformers, with checks.

    python examples/architectures.py --output architectures                      # some 50 minutes of one core
    python examples/architectures.py --types llama encoder/bert --checks drop quantize
    python examples/architectures.py --shard 0/2                                 # every second kind

The kinds are those of `architecture_kinds.py`: causal models, encoder-decoders, encoders, vision models, and models of
vision and language. Each function works, excludes (works, except for what the reason names), is refused (one
ValueError), or is wrong (a difference, or any other error). An interrupted run resumes. Shards with one output share
their results: the whole command writes the page of all of them.
Writes architectures.md, which is the page of the documentation, and architectures.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_checks import CHECKS, checks_of
from architecture_comparison import ROUNDING, Remark, WrongResult, distance, is_refusal, outputs
from architecture_images import NoImagesError
from architecture_inputs import batches_for
from architecture_kinds import kinds
from architecture_reload import ReloadError, reloaded_outputs
from architecture_tables import EXCLUDED, NOT_RUN, REFUSED, RESULTS, WORKS, WRONG, page
from tiny_architectures import Case
from tqdm import tqdm

import hf_cod
from hf_cod import find_decoder_layers
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal

SECONDS = 300  # for one check


def tried(case: Case, check: str) -> dict[str, str]:
    """What one check of one kind gives: {"result": one of the four, "why": a line}."""
    try:
        with _limited():
            note = CHECKS[check](case)
    except WrongResult as error:
        return {"result": WRONG, "why": str(error)}
    except ValueError as error:
        told = is_refusal(error)
        return {"result": REFUSED if told else WRONG, "why": _line(error) if told else f"ValueError: {_line(error)}"}
    except ReloadError as error:
        return {"result": WRONG, "why": f"reload: {_line(error)}"}
    except Exception as error:  # any other error is one that a user would see as a traceback
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"result": WRONG, "why": f"{type(error).__name__} {os.path.basename(place.filename)}: {_line(error)}"}
    return {"result": EXCLUDED if note and not isinstance(note, Remark) else WORKS, "why": note or ""}


@contextmanager
def _limited() -> Iterator[None]:
    """Raises TimeoutError after `SECONDS`; without effect outside of the main thread, or where there are no alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def built(case: Case) -> dict[str, Any]:
    """Whether a tiny model of a kind can be built, run and loaded again here: {"why": None or why not, "experts":
    whether its layers hold banks of experts, "no_images": why no images can be made for it, if it is to have some,
    "refused": why the package finds no layers in a model that transformers runs}."""
    try:
        model = case.build()
        banks = any(p.dim() == 3 and "expert" in name for name, p in model.named_parameters())
        if case.images:
            find_decoder_layers(model, case.stack)
            outputs(model, batches_for(case.without_images, model)[0])
        batch = batches_for(case, model)[0]
        again = reloaded_outputs(model, case.auto_class, batch, outputs)
        found = outputs(model, batch)
        why = None
        if not found.isfinite().all():
            why = "its outputs are not finite"
        elif distance(outputs(case.build(), batch), found) > 0:
            why = "its outputs are random"
        elif distance(again, found) > ROUNDING:
            why = f"transformers loads it with other outputs: {distance(again, found):.1e}"
    except NoImagesError as error:
        return {"why": None, "experts": banks, "no_images": _line(error)}
    except ValueError as error:  # of a model that transformers runs, the package finds no layers
        if str(error).startswith("model: "):
            return {"why": None, "experts": banks, "refused": _line(error)}
        return {"why": f"ValueError: {_line(error)}", "experts": False}
    except Exception as error:  # whatever a config of these sizes raises
        return {"why": f"{type(error).__name__}: {_line(error)}", "experts": False}
    return {"why": why, "experts": banks}


def sweep(
    chosen: Iterable[str], output: Path, checks: Sequence[str] = tuple(CHECKS), again: Sequence[str] = ()
) -> dict[str, Any]:
    """Checks kinds, and writes the page after each.

    Args:
        chosen: the kinds.
        output: the directory of the page and of the journal, from which results of the same versions are read.
        checks: names of checks.
        again: results with which a check is repeated.

    Returns:
        Kind -> {"built": see `built`, and for each check that was run what `tried` returns}.
    """
    journal = Journal(output / "journal.jsonl", fingerprint(_versions()))
    results: dict[str, Any] = {}
    for kind in tqdm(chosen, unit="kind"):
        case = Case(kind)
        results[kind] = {"built": _once(journal, f"{kind} built", partial(built, case), ())}
        if results[kind]["built"]["why"] is None:
            for check in (check for check in checks_of(case) if check in checks):
                results[kind][check] = _told(results[kind]["built"]) or _once(
                    journal, f"{kind} {check}", partial(tried, case, check), again
                )
        write_json(output / "architectures.json", {"versions": _versions(), "results": results})
        write_text(output / "architectures.md", page(results, _versions()))
    return results


def main() -> None:
    """Runs the checks of the kinds of this shard."""
    arguments = _arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = sweep(_chosen(arguments), Path(arguments.output), arguments.checks, arguments.again)
    print(page(results, _versions()))


def _told(found: dict[str, Any]) -> dict[str, str] | None:
    """The result of every check where `built` has it."""
    if "no_images" in found:
        return {"result": NOT_RUN, "why": f"not run on images: {found['no_images']}"}
    return {"result": REFUSED, "why": found["refused"]} if "refused" in found else None


def _once(journal: Journal, key: str, work: Callable[[], Any], again: Sequence[str]) -> Any:
    if key not in journal or journal[key].get("result") in again:
        journal.add(key, work())
    return journal[key]


def _versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (hf_cod, transformers, torch)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="kinds, such as llama or encoder/bert; default: all")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--again", nargs="+", default=[], choices=RESULTS, help="check again what had these results")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth kind, beginning with kind I")
    parser.add_argument("--output", default="architectures", help="directory for the page and the journal")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> Iterable[str]:
    first, every = (int(number) for number in arguments.shard.split("/"))
    return (arguments.types or kinds())[first::every]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


if __name__ == "__main__":
    main()
