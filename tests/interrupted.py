"""Commands that are killed, whose disk fills, or whose directory is deleted; `interruptions.py` draws the moments.

Each trial interrupts a command of `all_commands.RUNS` and starts it again: its directory must then hold what an
uninterrupted run writes, times aside, and no other file may have changed.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from subprocess import CompletedProcess

from tests.all_commands import RUNS
from tests.fresh_processes import FreshProcess, run_fresh
from tests.small_disks import resize, small_disk
from tests.test_same_bytes import contents

ROOT = Path(__file__).parent.parent
COMMAND = "import sys; from hf_cod.cli.main import main; sys.exit(main(sys.argv[1:]))"
# Its last look at its directory is what it ends with.
AT_ONCE = "import os, sys; from hf_cod.cli.main import main; status = main(sys.argv[1:]); sys.stderr.flush()"
AT_ONCE += "; os._exit(status)"
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
FINISHED, RESUMED, REFUSED = "finished", "resumed", "refused"
PAGE = 4096


@dataclass
class Seen:
    """What was seen of a command from outside.

    Attributes:
        seconds: since its start.
        made: after how many seconds its directory was there; None: it was not.
        changes: how often the names in its directory changed.
        bytes: the most that its directory occupied.
        kept: names of what its journal held for a resumed run.
    """

    seconds: float = 0.0
    made: float | None = None
    changes: int = 0
    bytes: int = 0
    kept: set[str] = field(default_factory=set)
    _names: set[str] = field(default_factory=set)

    @property
    def saves(self) -> bool:
        """Whether there was a checkpoint when it was looked at last."""
        return any(name.startswith("checkpoint-") for name in self._names)

    def look(self, directory: Path, seconds: float) -> None:
        self.seconds = seconds
        if self.made is None and directory.is_dir():
            self.made = seconds
        names, occupied = set(), 0
        for folder, _, files in os.walk(directory):
            for name in files:
                path = Path(folder, name)
                with suppress(OSError):
                    occupied += path.stat().st_blocks * 512
                names.add(str(path.relative_to(directory)))
        self.bytes = max(self.bytes, occupied)
        self.changes += names != self._names
        self._names = names
        self.kept |= {name for name in names if name.startswith("journal/") and is_kept(name.split("/")[1])}


def is_kept(name: str) -> bool:
    return not name.startswith(".") and name not in ("result", "manifest.json", "lock")


def watch(process: FreshProcess, directory: Path, until: Callable[[Seen], bool]) -> Seen:
    """Looks at a command's directory until it ends, or until something is seen."""
    seen, start = Seen(), time.monotonic()
    while not process.ended(0.005):
        seen.look(directory, time.monotonic() - start)
        if until(seen):
            break
    return seen


class Ground:
    """A directory with the files of uninterrupted runs, and a copy of it in which commands are interrupted.

    Attributes:
        usual: name of a run -> what was seen of it when nothing interrupted it.
        interrupted: a copy of the directory as the last interrupted command left it.
    """

    def __init__(self, folder: Path) -> None:
        self.interrupted = folder / "interrupted"
        # Of one name, so that no path tells them apart.
        self._whole, self._trials = folder / "whole" / "here", folder / "trials" / "here"
        self.usual: dict[str, Seen] = {}
        self._whole.mkdir(parents=True)
        prepare = "from tests.all_commands import prepare; prepare()"
        assert run_fresh(prepare, cwd=self._whole, paths=[ROOT]).returncode == 0
        shutil.copytree(self._whole, self._trials)

    def prepare(self, name: str) -> Seen:
        """Runs a command, and those whose results it reads, without an interruption, unless this has been done."""
        if name in self.usual:
            return self.usual[name]
        for word in RUNS[name].split()[1:]:
            if word.split("/")[0] in RUNS:
                self.prepare(word.split("/")[0])
        process = self._start(name, self._whole)
        self.usual[name] = watch(process, self._whole / name, lambda seen: False)
        ended = process.wait()
        assert ended.returncode == 0, (name, ended.stderr)
        shutil.copytree(self._whole / name, self._trials / name)
        return self.usual[name]

    def _start(self, name: str, folder: Path, code: str = COMMAND) -> FreshProcess:
        words = [name if word == "{}" else word for word in RUNS[name].split()]
        words = words if "{}" in RUNS[name] else [*words, "--output", name]
        return FreshProcess(code, *words, cwd=folder, environment=ENVIRONMENT)

    @contextmanager
    def _trial(self, name: str) -> Iterator[Path]:
        """The directory that a command is to make, which is whole again afterwards."""
        self.prepare(name)
        output = self._trials / name
        shutil.rmtree(output)
        shutil.rmtree(self.interrupted, ignore_errors=True)
        try:
            yield output
        except BaseException:
            shutil.rmtree(self._trials)
            shutil.copytree(self._whole, self._trials)
            raise
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(self._whole / name, output)

    def killed(self, name: str, signal: int, until: Callable[[Seen], bool]) -> str:
        """A signal ends the command; the same command ends as if there had been none."""
        with self._trial(name) as output:
            process = self._start(name, self._trials)
            seen = watch(process, output, until)
            process.send(signal)
            ended = process.wait()
            self._took(name, seen, ended)
            assert ended.returncode in (0, -signal, 128 + signal), f"ended with {ended.returncode}: {ended.stderr}"
            return self._end(name, ended.returncode == 0)

    def deleted(self, name: str, until: Callable[[Seen], bool]) -> str:
        """The directory is deleted: the command says so in one line, or has written all of it."""
        with self._trial(name) as output:
            process = self._start(name, self._trials, AT_ONCE)
            seen = watch(process, output, until)
            # Nothing can notice that its directory goes once it has verified it, and removed its journal.
            late, verified = process.ended(), output.exists() and not (output / "journal").exists()
            if not late:
                shutil.rmtree(output, ignore_errors=True)
            meanwhile = not late and (verified or process.ended())
            ended = process.wait()
            self._took(name, seen, ended)
            if ended.returncode:
                check_refused(name, ended)
            return self._end(name, ended.returncode == 0 and not meanwhile)

    def lost(self, name: str) -> str:
        """The directory is deleted while a checkpoint is written, and a signal ends the training in the next one."""
        with self._trial(name) as output:
            process = self._start(name, self._trials)
            watch(process, output, lambda seen: seen.saves)
            shutil.rmtree(output, ignore_errors=True)
            watch(process, output, lambda seen: seen.saves)
            process.send(SIGKILL)
            process.wait()
            return self._end(name, False)

    def filled(self, name: str, pages: int) -> str:
        """The disk has so many pages: one line, nothing half; with more of them the same command ends as usual."""
        with self._trial(name) as output, small_disk(output, pages * PAGE):
            process = self._start(name, self._trials)
            seen = watch(process, output, lambda seen: False)
            ended = process.wait()
            if ended.returncode:
                check_refused(name, ended)
                self._check_half(name, seen)
            resize(output, 1 << 28)
            return self._end(name, ended.returncode == 0)

    def _took(self, name: str, seen: Seen, ended: CompletedProcess) -> None:
        """Notes that a command was quicker than it used to be, or had fewer changes that could be seen."""
        if ended.returncode == 0:
            usual = self.usual[name]
            usual.seconds, usual.changes = min(usual.seconds, seen.seconds), min(usual.changes, seen.changes)

    def _check_half(self, name: str, seen: Seen) -> None:
        """What a command leaves that fails: its journal, checkpoints, and results that are complete."""
        output, wrong = self._trials / name, []
        for path in files_of(output):
            where = path.relative_to(output)
            if is_kept(where.parts[0]) and where.parts[0] != "journal" and not where.parts[0].startswith("checkpoint-"):
                wrong += [f"{where} is not whole"] if differs(path, self._whole / name / where, part=True) else []
            elif not all(map(is_kept, where.parts)):
                wrong.append(f"{where} is left")
        wrong += [f"{kept} was removed" for kept in seen.kept if not (output / kept).is_file()]
        assert not wrong, "after the error: " + ", ".join(wrong)

    def keep(self, name: str) -> None:
        """Keeps what the last interrupted command left."""
        if self.interrupted.exists():
            self.interrupted.rename(self.interrupted.parent / name)

    def _end(self, name: str, finished: bool) -> str:
        """How a trial ended, after the command is started again if it had not finished."""
        if (self._trials / name).exists():
            shutil.copytree(self._trials / name, self.interrupted)
        again = None if finished else self._start(name, self._trials).wait()
        refused = again is not None and again.returncode != 0
        if refused:
            check_refused(name, again)
        wrong = self._differences()
        assert not wrong, f"{'refused' if refused else 'at the end'}: {', '.join(wrong)}" + (
            f"; it said {again.stderr}" if refused else ""
        )
        return FINISHED if again is None else REFUSED if refused else RESUMED

    def _differences(self) -> list[str]:
        found, expected = (
            {path.relative_to(folder) for path in files_of(folder, empty=True)}
            for folder in (self._trials, self._whole)
        )
        wrong = [f"{path} is {'missing' if path in expected else 'left'}" for path in sorted(found ^ expected)]
        both = [(self._trials / path, self._whole / path) for path in sorted(found & expected)]
        return wrong + [f"{path.relative_to(self._trials)} differs" for path, other in both if differs(path, other)]


def files_of(folder: Path, empty: bool = False) -> list[Path]:
    """Files in a directory, and on demand directories in which is nothing."""
    return [path for path in folder.rglob("*") if path.is_file() or (empty and not any(path.iterdir()))]


def differs(path: Path, expected: Path, part: bool = False) -> bool:
    """Whether a file is another one than expected, times aside; of lines that are appended the first may do."""
    if not path.is_file() or not expected.is_file():
        return path.is_file() != expected.is_file() or path.is_dir() != expected.is_dir()
    if part and path.suffix == ".jsonl":
        return not expected.read_bytes().startswith(path.read_bytes())
    if path.name == "journal.jsonl":  # what was measured before it was deleted is measured again, and stands last
        return sorted(path.read_bytes().splitlines()) != sorted(expected.read_bytes().splitlines())
    try:
        return not filecmp.cmp(path, expected) and contents(path) != contents(expected)
    except ValueError:  # no JSON
        return True


def check_refused(name: str, ended: CompletedProcess) -> None:
    """A command failed with one line, without a traceback."""
    told = [line for line in ended.stderr.splitlines() if line.startswith(f"hf-cod {RUNS[name].split()[0]}: error: ")]
    assert ended.returncode in (1, 2) and len(told) == 1 and "Traceback" not in ended.stderr, (
        f"status {ended.returncode}, expected one line, got {ended.stderr!r}"
    )
