"""TrainingHistory: measures of each layer at each measured step of a training, one JSON line per step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cod.analysis.monitoring.health import find_trouble
from hf_cod.io.arguments import checked
from hf_cod.io.files import append_line, check_file, write_text
from hf_cod.io.reading import checksum, naming_file, read_json_lines, take_format
from hf_cod.io.report import RunReport, environment, format_number
from hf_cod.io.schema import brief, check_value, limits, read_record

FORMAT_VERSION = 1
FILE_NAME = "history.jsonl"
CHECKSUM = "checksum"  # the last entry of each line
MOST_LAYERS = 100_000
# Measures with one value per layer, and those with one value per step.
PER_LAYER = ("gradient_norm", "variance", "max_abs", "added_share", "angular_distance")
PER_STEP = ("effective_depth", "late_share", "clip_factor")


@dataclass(frozen=True)
class _Header:
    """Required entries of the first line; it may have further ones of the monitor and the caller."""

    model: str
    layers: int = field(metadata=limits(least=1, most=MOST_LAYERS))
    settings: dict[str, Any]
    probe: str | None = None


class TrainingHistory:
    """Measured steps of one training run.

    The first line of the file is a header (format, model, layers, settings, probe). Each further line is one measured
    step: `step`; one value per layer in `gradient_norm` (None if no parameter of a layer is trained), `variance`,
    `max_abs`, `added_share` and `angular_distance` (to the next layer); `effective_depth`, `late_share`, `clip_factor`
    (the factor by which clipping multiplied the gradients); and `failure`, a message if the probe could not be
    measured. Each line ends with its checksum; lines of earlier versions have none. A line is on disk before training
    continues.

    Attributes:
        header: the entries of the first line.
        path: the file, or None to keep everything in memory.
        lines: the measured steps, in order.
    """

    @checked
    def __init__(self, header: dict[str, Any], path: str | Path | None = None) -> None:
        self.header = {"format": FORMAT_VERSION, **header}
        self.path = None if path is None else Path(path)
        if self.path is not None:
            check_file("history", self.path)
        self.lines: list[dict[str, Any]] = []

    @classmethod
    @checked
    def load(cls, path: str | Path) -> TrainingHistory:
        """Reads a history from its file or directory; an incomplete last line is ignored.

        Raises:
            ValueError: no history found, another format, or invalid or damaged lines.
        """
        file = _file_of(Path(path))
        if not file.is_file():
            lacks = f"which has no {FILE_NAME}" if file.is_dir() else "which does not exist"
            raise ValueError(f"history: expected a training history of hf_cod, got {str(file)!r}, {lacks}")
        whole = read_json_lines(file, "history")
        with naming_file(file):
            if not whole:
                raise ValueError("history: expected a training history of hf_cod, got no complete line")
            _check_sums(whole)
            header = take_format(whole[0], FORMAT_VERSION, "history")
            layers = read_record(_Header, header, "history line 1", extra=True).layers
            for number, line in enumerate(whole[1:], 2):
                _check_line(line, layers, f"history line {number}")
        history = cls(header, file)
        history.lines = whole[1:]
        return history

    def start(self, step: int = 0) -> None:
        """Starts at `step`. When resuming from a checkpoint, lines after its step are removed.

        The history of a resumed run is thus the same as that of an uninterrupted one. At step 0 an existing history,
        with its report and plots, is moved to earlier-1 (earlier-2, ...).

        Raises:
            ValueError: when resuming, the file has measures of another probe or number of layers.
        """
        self.lines = []
        if self.path is not None and self.path.exists():
            earlier = TrainingHistory.load(self.path)
            if step:
                self._continue(earlier, step)
            else:
                self._keep(earlier)
        if self.path is not None:
            write_text(self.path, "".join(f"{_json(line)}\n" for line in (self.header, *self.lines)))

    def _continue(self, earlier: TrainingHistory, step: int) -> None:
        for name in ("layers", "probe"):
            expected, found = self.header.get(name), earlier.header.get(name)
            if found != expected:
                raise ValueError(
                    f"history: expected {name} {expected} as before, got {found} in {str(self.path)!r}; resume with "
                    "the same probe, or choose another output_dir"
                )
        self.lines = [line for line in earlier.lines if line["step"] <= step]

    def _keep(self, earlier: TrainingHistory) -> None:
        """Moves the history and report of an earlier run into its own directory."""
        assert self.path is not None
        if not earlier.lines:
            return
        directory = self.path.parent
        if not (directory / "report.json").exists():  # the earlier training was not completed
            earlier.report().save(directory)
        new = RunReport("training", self.header["model"], self._settings(), {}, {}, {})
        new.keep_earlier(directory, (self.path.name,), resumable=False)

    def _settings(self) -> dict[str, Any]:
        return {**self.header["settings"], "probe": self.header.get("probe")}

    def add(self, line: dict[str, Any]) -> None:
        """Records one measured step; it is on disk when this returns."""
        line = _without_nan(line)
        self.lines.append(line)
        if self.path is not None:
            append_line(self.path, _json(line))

    def report(self) -> RunReport:
        """The history as a report: `layers` hold the last measured step, `results["history"]` all steps by measure.

        Raises:
            ValueError: no measured steps.
        """
        if not self.lines:
            raise ValueError("history: expected at least one measured step, got none")
        measures = [name for name in (*PER_LAYER, *PER_STEP) if any(line.get(name) for line in self.lines)]
        columns = {name: [line.get(name) for line in self.lines] for name in ("step", *measures)}
        last = {name: next(row for row in reversed(columns[name]) if row) for name in PER_LAYER if name in columns}
        trouble: dict[tuple[str, int], str] = {}
        for end in range(1, len(self.lines) + 1):  # each with the step of its first occurrence
            trouble = {**find_trouble(self.lines[:end]), **trouble}
        return RunReport(
            kind="training",
            model=self.header["model"],
            settings=self._settings(),
            environment=environment(),
            layers=last,
            results={"history": columns},
            summary=_summary(columns, self.header["layers"]),
            notes=list(trouble.values()),
        )


def _check_line(line: Any, layers: int, name: str) -> None:
    """Checks that a line has a step number, and that its measures are numbers or None."""
    check_value(line, dict[str, Any], name)
    if "step" not in line:
        raise ValueError(f"{name}: expected a step, got none")
    check_value(line["step"], int, f"{name} step", limits(least=0))
    for measure in PER_STEP:
        check_value(line.get(measure), float | None, f"{name} {measure}")
    check_value(line.get("failure"), str | None, f"{name} failure")
    for measure in PER_LAYER:
        values = check_value(line.get(measure), list[float | None] | None, f"{name} {measure}")
        if values is not None and len(values) != layers:
            raise ValueError(f"{name} {measure}: expected {layers} values, got {brief(values)}")


def _summary(columns: dict[str, list[Any]], layers: int) -> list[str]:
    """Sentences on the changes between the first and the last measured step."""

    def change(name: str, value: Any = lambda row: row) -> str:
        rows = columns.get(name, [None] * len(columns["step"]))
        known = [(step, value(row)) for step, row in zip(columns["step"], rows, strict=True) if row is not None]
        if not known:
            return ""
        (first, a), (last, b) = known[0], known[-1]
        return f"went from {format_number(a)} at step {first} to {format_number(b)} at step {last}"

    found = {
        f"Effective depth, of {layers} layers,": change("effective_depth"),
        "The late half's share of all angular distance (0.5 if all layers contribute equally)": change("late_share"),
        "Output variance after the first layer": change("variance", lambda row: row[0]),
        "Output variance after the last layer": change("variance", lambda row: row[-1]),
    }
    return [f"{subject} {words}." for subject, words in found.items() if words]


def _file_of(path: Path) -> Path:
    """The history file for a path: the path itself, or the file in this directory or in a run's output directory."""
    inside = (path / FILE_NAME, *sorted(path.glob(f"*/{FILE_NAME}"))) if path.is_dir() else ()
    return next((file for file in inside if file.is_file()), path)


def _json(value: dict[str, Any]) -> str:
    """A line of the file, with its checksum."""
    text = json.dumps(value, allow_nan=False)
    return f'{text[:-1]}, "{CHECKSUM}": "{checksum(text)}"}}'


def _check_sums(lines: list[Any]) -> None:
    """Compares the checksums of parsed lines, and removes them. All lines have one if the first line does.

    A parsed line is written as it was: numbers have only one shortest form.
    """
    needed = isinstance(lines[0], dict) and CHECKSUM in lines[0]
    for number, line in enumerate(lines, 1):
        told = line.pop(CHECKSUM, None) if isinstance(line, dict) else None
        if (told is not None or needed) and told != checksum(json.dumps(line)):
            way_out = "remove the line" if number > 1 else "move the file away"
            raise ValueError(
                f"history line {number}: expected the line as it was written, got another checksum; {way_out} to resume"
            )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
