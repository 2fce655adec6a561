"""RunReport: settings and results of a run, as one JSON file, a Markdown page and, by `PICTURES`, plots."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers

from hf_cod._version import __version__
from hf_cod.io.arguments import checked
from hf_cod.io.files import check_file, write_json, write_text
from hf_cod.io.markdown import escaped
from hf_cod.io.reading import as_read, naming_file, read_json, take_format
from hf_cod.io.report_columns import legend
from hf_cod.io.schema import check_value, read_record
from hf_cod.io.settings import PLOT_FORMATS

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Module that plots reports. Imported by name, because it imports this module.
PICTURES = "hf_cod.reporting.plots"
# Module that makes pages of reports, for the same reason, and the name of such a page beside report.json.
PAGES, PAGE = "hf_cod.reporting.html.page", "report.html"
# If all values differ by at most this share of the largest, none of them stands out.
ALIKE = 0.01


def environment(device: Any = None, dtype: Any = None) -> dict[str, str]:
    """Versions of the software and type of the machine, recorded with each measurement."""
    found = {
        "hf_cod": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device is not None:
        found["device"] = str(device)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found


class DropResults(TypedDict):
    """The entry `layer_drop` of a report's results."""

    metric: str
    lower_is_better: bool
    intact: float | None
    without: list[float | None]


class Interval(TypedDict):
    """The entry `effective_depth` of a report's results."""

    value: float | None
    low: float | None
    high: float | None
    confidence: float


@dataclass(frozen=True)
class RunReport:
    """Settings and results of a run.

    Attributes:
        kind: the command or function of the run, such as "diagnose".
        model: the model's name.
        settings: all settings of the run, including seeds.
        environment: versions, device, dtype, time.
        layers: measure -> one value per layer, from layer 0 on (None if it could not be measured).
        results: all results other than values per layer; documented by the function that returns the report.
        summary: the results in sentences.
        notes: omitted measurements, with reasons, and warnings.
    """

    kind: str
    model: str
    settings: dict[str, Any]
    environment: dict[str, str]
    layers: dict[str, list[Any]]
    results: dict[str, Any]
    summary: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return max((len(values) for values in self.layers.values()), default=0)

    @checked
    def save(self, directory: str | Path) -> Path:
        """Writes `report.json` and `report.md` into `directory`; returns the path of `report.json`."""
        directory = Path(directory)
        path = write_json(directory / "report.json", self.to_json())
        write_text(directory / "report.md", self.to_markdown(directory))
        return path

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`: NaN is None there, infinity the text "inf"."""
        return {"format": FORMAT_VERSION, **_finite(asdict(self))}

    def keep_earlier(self, directory: str | Path, others: Sequence[str] = (), resumable: bool = True) -> Path | None:
        """Moves the report of a run with another model or settings from `directory` to earlier-1, earlier-2, ...

        Args:
            directory: the directory in which this report is to be saved.
            others: names of further files that belong to a report there.
            resumable: whether equal settings mean the same run; False if a setting cannot be compared (a function).

        Returns:
            The new place of the earlier report; None if there was none, or it belongs to the same run.

        Raises:
            ValueError: `directory` is a file, or has a directory with the name of a report.
        """
        directory = Path(directory)
        if directory.is_file():
            raise ValueError(f"output: expected a directory, got {str(directory)!r}, which is a file")
        for name in ("report.json", "report.md", PAGE):
            check_file("output", directory / name)
        if not (directory / "report.json").is_file():
            return None
        earlier = RunReport.load(directory)
        # Converted to JSON and back, as the settings of the earlier report were.
        settings = _restored(as_read(_finite(self.settings)))
        # A command adds settings of its inputs to a finished report.
        known = {name: value for name, value in earlier.settings.items() if name in settings}
        if resumable and (earlier.kind, earlier.model, known) == (self.kind, self.model, settings):
            return None
        taken = [path.name.removeprefix("earlier-") for path in directory.glob("earlier-*")]
        number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
        target = directory / f"earlier-{number}"
        target.mkdir()
        for name in ("report.json", "report.md", PAGE, *others, *(path.name for path in _pictures_in(directory))):
            if (directory / name).is_file():
                (directory / name).replace(target / name)
        logger.warning("%s held a report of %s with other settings: moved to %s", directory, earlier.model, target)
        return target

    @classmethod
    @checked
    def load(cls, path: str | Path) -> RunReport:
        """Reads a report from its directory or from its JSON file.

        Raises:
            ValueError: no report there, another format version, or unknown entries.
        """
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"report: expected a directory with a report.json, or such a file, got {str(path)!r}")
        content = read_json(file, "report")
        with naming_file(file):
            entries = take_format(content, FORMAT_VERSION, "report")
            report = read_record(cls, {key: _restored(value) for key, value in entries.items()}, "report")
            report._check_read()
        return report

    def _check_read(self) -> None:
        """Checks that each measure has one value per layer, and the results that plots read."""
        for name, values in self.layers.items():
            check_value(values, list[float | None], f"layers[{name!r}]", {"nan": True})
            if len(values) != self.n_layers:
                raise ValueError(f"layers[{name!r}]: expected {self.n_layers} values, got {len(values)}")
        for name in ("curve", "validation"):
            if self.results.get(name) is not None:
                _check_pairs(self.results[name], f"results.{name}")
        if "layer_drop" in self.layers:
            check_value(self.results.get("layer_drop"), DropResults, "results.layer_drop", {"nan": True})
        intervals = check_value(self.results.get("intervals") or {}, dict[str, Any], "results.intervals")
        for name, pairs in intervals.items():
            _check_pairs(pairs, f"results.intervals[{name!r}]")

    @checked
    def plot(self, directory: str | Path | None = None, plot_format: str = "png") -> Any:
        """Plots the report: returns the overview as a matplotlib figure and, given a directory, saves all plots there.

        Args:
            directory: directory for the plots; None: nothing is written.
            plot_format: png, pdf or svg.

        Raises:
            ImportError: matplotlib is not installed; the message gives the pip command.
        """
        return import_module(PICTURES).plot_report(self, directory, plot_format)

    def to_html(self) -> str:
        """The report as one interactive HTML page, which loads nothing from elsewhere.

        The page has bars by layer, the angular distances between all layers, and a budget that it distributes over the
        layers; all numbers of `report.json` are in it.

        Raises:
            ValueError: results that are not as `diagnose` writes them.
        """
        page: str = import_module(PAGES).page_of([self], [self.model], self.summary)
        return page

    @checked
    def to_markdown(self, directory: str | Path | None = None) -> str:
        """The report as a Markdown page, with the plots in `directory`. Names and notes are escaped."""
        parts = [f"# {self.kind}: {escaped(self.model)}", "", *[f"- {escaped(line)}" for line in self.summary], ""]
        pictures = _pictures_in(Path(directory)) if directory else []
        parts += [f"![{picture.stem.replace('_', ' ')}]({picture.name})\n" for picture in pictures]
        if self.layers:
            names = list(self.layers)
            parts += ["| layer | " + " | ".join(escaped(name.replace("_", " ")) for name in names) + " |"]
            parts += ["|---:" * (len(names) + 1) + "|"]
            for i in range(self.n_layers):
                parts.append(f"| {i} | " + " | ".join(format_number(self.layers[n][i]) for n in names) + " |")
            parts += ["", *[f"- {line}" for line in legend(names)], ""]
        if self.notes:
            parts += ["Notes:", "", *[f"- {escaped(note)}" for note in self.notes], ""]
        parts += ["Settings: " + ", ".join(escaped(f"{k} = {v}") for k, v in self.settings.items()) + ".", ""]
        parts += ["Made with " + ", ".join(escaped(f"{k} {v}") for k, v in self.environment.items()) + ".", ""]
        return "\n".join(parts)


def _check_pairs(pairs: Any, field: str) -> None:
    """Checks a list of pairs of numbers, such as [step, loss]."""
    for pair in check_value(pairs, list[list[float | None]], field, {"nan": True}):
        if len(pair) != 2:
            raise ValueError(f"{field}: expected pairs of numbers, got {len(pair)}")


def _pictures_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*") if path.suffix[1:] in PLOT_FORMATS)


def format_number(value: float | None) -> str:
    """A number for display: four significant digits, all digits before the point, "-" if not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if 10_000 <= abs(value) < 10_000_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_interval(found: Interval | None) -> str:
    """An estimate with its interval for display, as far as it was measured."""
    if found is None or found["value"] is None:
        return "-"
    known = found["low"] is not None and found["high"] is not None
    return f"{found['value']:.1f}" + (f" ({found['low']:.1f} to {found['high']:.1f})" if known else "")


def told_share(share: float, digits: int = 0) -> str:
    """A recovered share for display; a negative one, after a training that made the model worse, is "nothing"."""
    return "nothing" if share < 0 else f"{share:.{digits}%}"


def standing_out(values: Sequence[float | None], count: int, least: bool = False) -> list[int]:
    """At most `count` layers with the largest (with `least`: smallest) finite values, the most extreme first.

    A layer is left out if the first layer beyond `count` has the same formatted value, since the choice between them
    would be arbitrary. If all values are equal within `ALIKE`, no layer is returned.
    """
    known = {i: value for i, value in enumerate(values) if value is not None and math.isfinite(value)}
    if known and max(known.values()) - min(known.values()) <= ALIKE * max(map(abs, known.values())):
        return []
    order = sorted(known, key=lambda i: known[i] if least else -known[i])
    next_figure = [format_number(known[i]) for i in order[count : count + 1]]
    return [i for i in order[:count] if format_number(known[i]) not in next_figure]


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: NaN becomes null, infinity the text "inf"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value
