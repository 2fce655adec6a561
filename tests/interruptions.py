"""Interrupts all commands at random moments, in the three ways of `interrupted.py`, and prints what became of them.

    python -m tests.interruptions --kills 200 --full 20 --deleted 20 --seed 0

Its exit status is 1 if a trial is wrong. `test_interruptions.py` runs a few of them.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

# Nothing of hf_cod is imported here: the processes of the trials import this module as their parent's main module, and
# may not have what they are to import themselves.

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
Trial = tuple[str, Callable[[], str]]  # its moment in words, and what runs it
Counts = Counter[tuple[str, str]]  # (name of a run, outcome) -> trials
OUTCOMES = ("finished", "resumed", "refused", "wrong")


def kill(ground, name: str, chance: random.Random) -> Trial:
    """A signal at a random moment: of the whole time, of its last tenth, or of those at which a file comes or goes."""
    usual, number, kind = ground.prepare(name), chance.choice(SIGNALS), chance.choice(("any", "late", "change"))
    if kind == "change":
        change = chance.randint(1, max(1, usual.changes))
        return f"{number.name} at change {change}", lambda: ground.killed(name, number, lambda s: s.changes >= change)
    at = usual.seconds * (chance.random() if kind == "any" else chance.uniform(0.9, 1.0))
    return f"{number.name} after {at:.2f} s", lambda: ground.killed(name, number, lambda seen: seen.seconds >= at)


def fill(ground, name: str, chance: random.Random) -> Trial:
    """A disk with fewer pages than the command needs at most."""
    pages = chance.randint(1, max(1, ground.prepare(name).bytes // 4096))
    return f"full after {pages} pages", lambda: ground.filled(name, pages)


def delete(ground, name: str, chance: random.Random) -> Trial:
    """The directory is deleted at a random moment of those at which it is there."""
    usual = ground.prepare(name)
    at = chance.uniform(usual.made or 0.0, usual.seconds)
    return f"deleted after {at:.2f} s", lambda: ground.deleted(name, lambda seen: seen.seconds >= at)


def interrupt(
    ground, draw: Callable, number: int, names: Sequence[str], chance: random.Random, told: Callable
) -> Counts:
    """A number of trials, spread over the commands; `told` gets a line for each.

    One that ended before it was interrupted is drawn again, a few times: the machine has other work at other times.
    """
    counts: Counts = Counter()
    order: list[str] = []
    for trial in range(number):
        order = order or chance.sample(names, len(names))
        name = order.pop()
        for _ in range(5):
            moment, run = draw(ground, name, chance)
            try:
                outcome = run()
            except AssertionError as error:
                outcome = "wrong"
                told(f"WRONG: {name}, {moment}: {error}")
                ground.keep(f"{draw.__name__}-{trial}-{name}")
            counts[name, outcome] += 1
            told(f"{draw.__name__} {trial + 1}/{number}: {name}, {moment}: {outcome}")
            if outcome != "finished":
                break
    return counts


def show(counts: Counts) -> None:
    print(f"{'command':<20} {'trials':>8}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    names = sorted({name for name, _ in counts})
    for name in [*names, None]:
        row = [
            sum(number for (of, ended), number in counts.items() if name in (of, None) and ended == outcome)
            for outcome in OUTCOMES
        ]
        print(f"{name or 'all':<20} {sum(row):>8}" + "".join(f"{number:>10}" for number in row))


def main() -> int:
    from tests.fresh_processes import preload
    from tests.interrupted import RUNS, Ground
    from tests.small_disks import can_mount

    preload("matplotlib.pyplot", "peft", "rich.table")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("--kills", 200), ("--full", 20), ("--deleted", 20), ("--seed", 0)):
        parser.add_argument(name, type=int, default=number)
    parser.add_argument("--commands", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--folder", type=Path, help="keeps what wrong trials left there")
    asked = parser.parse_args()
    if asked.full and not can_mount():
        parser.error("--full: needs to mount file systems; use --full 0")
    counts: Counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(asked.folder or folder))
        for kind, draw in DRAWN.items():
            number, chance = getattr(asked, kind), random.Random(f"{asked.seed} {kind}")
            counts += interrupt(ground, draw, number, asked.commands, chance, lambda line: print(line, file=sys.stderr))
    show(counts)
    return int(any(outcome == "wrong" for _, outcome in counts))


DRAWN = {"kills": kill, "full": fill, "deleted": delete}

if __name__ == "__main__":
    sys.exit(main())
