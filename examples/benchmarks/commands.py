"""CPU time of whole commands, of this checkout against another one, measured in turns.

    git worktree add ../before COMMIT
    python examples/benchmarks/commands.py --before ../before --model DIRECTORY_OR_HUB_ID --output commands.json

Each round runs each command once with each checkout, in processes of their own, and the order changes from round to
round. CPU time counts all threads of a process, so it includes the import of torch and the loading of the model. The
ratio is the median over rounds of this checkout's time by the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
COMMANDS = {
    "diagnose": ["diagnose", "--no-plots"],
    "prune": ["prune", "--sparsity", "0.5", "--no-plots"],
}


def cpu_seconds(command: list[str], checkout: Path, model: str, options: list[str]) -> float:
    """CPU seconds, user and system, of one command with the package of a checkout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "hf_cod", command[0], model, *command[1:], *options, "--output", f"{folder}/run"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            check=True,
            capture_output=True,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="the other checkout of this repository")
    parser.add_argument("--model", required=True, help="model that the commands run on")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command with each checkout")
    parser.add_argument("--output", help="JSON file for the figures")
    arguments, options = parser.parse_known_args()  # further options go to the commands
    checkouts = {"before": arguments.before.resolve(), "now": HERE}
    found = {}
    for name, command in COMMANDS.items():
        seconds: dict[str, list[float]] = {which: [] for which in checkouts}
        for turn in range(arguments.rounds):
            for which in sorted(checkouts, reverse=bool(turn % 2)):
                seconds[which].append(cpu_seconds(command, checkouts[which], arguments.model, options))
        ratios = [now / before for now, before in zip(seconds["now"], seconds["before"], strict=True)]
        found[name] = {"ratio": statistics.median(ratios), "ratios": ratios, **seconds}
        middle = {which: statistics.median(values) for which, values in seconds.items()}
        print(f"{name:<10} before {middle['before']:7.2f} s   now {middle['now']:7.2f} s   ratio", end=" ")
        print(f"{found[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
