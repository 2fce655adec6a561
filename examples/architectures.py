"""Each function of the package on a tiny random model of every causal architecture of transformers, with checks.

    python examples/architectures.py --output architectures                      # some 8 minutes of one core
    python examples/architectures.py --types llama mamba --checks drop quantize
    python examples/architectures.py --shard 0/2                                 # every second type

Prints one line for each type and function: works, excluded (works, and says what it left out), refused (one ValueError)
or wrong (a difference, or any other error). An interrupted run resumes. Writes architectures.md and architectures.json.
"""

from __future__ import annotations

import argparse
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from architecture_checks import CHECKS, WrongResult, batches_for
from tiny_architectures import build, types
from tqdm import tqdm

from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal

WORKS, EXCLUDED, REFUSED, WRONG = "works", "excluded", "refused", "wrong"


def tried(kind: str, check: str) -> dict[str, str]:
    """What one check of one type gives: {"result": one of the four, "why": a line}."""
    try:
        note = CHECKS[check](partial(build, kind))
    except WrongResult as error:
        return {"result": WRONG, "why": str(error)}
    except ValueError as error:
        return {"result": REFUSED, "why": _line(error)}
    except Exception as error:  # any other error is one that a user would see as a traceback
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"result": WRONG, "why": f"{type(error).__name__} {os.path.basename(place.filename)}: {_line(error)}"}
    return {"result": EXCLUDED if note else WORKS, "why": note or ""}


def not_built(kind: str) -> str | None:
    """Why a tiny model of a type cannot be built or run here; None if it can."""
    try:
        model = build(kind)
        if not model(**batches_for(model)[0]).logits.isfinite().all():
            return "its logits are not finite"
    except Exception as error:  # whatever a config of these sizes raises
        return f"{type(error).__name__}: {_line(error)}"
    return None


def table(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """Counts of each result, and one line for whatever does not simply work."""
    counts = {
        check: Counter(found[check]["result"] for found in results.values() if check in found) for check in CHECKS
    }
    lines = [f"| of {len(results)} types | works | excluded | refused | wrong |", "|---|---|---|---|---|"]
    for check, count in counts.items():
        lines.append(f"| {check} | {' | '.join(str(count[kind]) for kind in (WORKS, EXCLUDED, REFUSED, WRONG))} |")
    lines += ["", "| type | function | result | why |", "|---|---|---|---|"]
    for kind, found in results.items():
        for check, entry in found.items():
            if entry["result"] != WORKS:
                lines.append(f"| {kind} | {check} | {entry['result']} | {entry['why'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the checks of the types of this shard, and writes the table after each type."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    output = Path(arguments.output)
    journal = Journal(output / "journal.jsonl", fingerprint({"transformers": transformers.__version__}))
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for kind in tqdm(_chosen(arguments), unit="type"):
        if f"{kind} built" not in journal:
            journal.add(f"{kind} built", not_built(kind))
        if journal[f"{kind} built"] is not None:
            missing[kind] = journal[f"{kind} built"]
            continue
        for check in arguments.checks:
            if f"{kind} {check}" not in journal:
                journal.add(f"{kind} {check}", tried(kind, check))
        results[kind] = {check: journal[f"{kind} {check}"] for check in arguments.checks}
        write_json(output / "architectures.json", {"results": results, "not_built": missing})
        write_text(output / "architectures.md", table(results))
    print(table(results))
    for kind, why in missing.items():
        print(f"{kind} was not built: {why}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; default: all causal ones")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth type, beginning with type I")
    parser.add_argument("--output", default="architectures", help="directory for the table and the journal")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> Iterable[str]:
    first, every = (int(number) for number in arguments.shard.split("/"))
    return (arguments.types or types())[first::every]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main()
