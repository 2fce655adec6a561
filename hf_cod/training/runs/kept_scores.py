"""The scores by which a run samples layers: kept in its directory, because a resumed run must sample by the same."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_cod.io.display import one_line
from hf_cod.io.reading import checksum
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.runs.run_directory import SCORES_FILE, SCORES_NOTE, note, noted_scores

logger = logging.getLogger(__name__)


def kept_scores(directory: Path) -> LayerScores | None:
    """The scores that the run in a directory has computed; None if there are none, or if their file was changed, which
    a warning says.

    Raises:
        ValueError: the file of a run of an earlier version, which noted no checksum, is damaged.
    """
    path, noted = directory / SCORES_FILE, noted_scores(directory)
    if not path.is_file():
        return None
    if noted is None:
        return LayerScores.load(path)
    try:
        scores = LayerScores.load(path)
        if _checksum(scores) != noted:
            raise ValueError("scores: expected those that the run has computed, got others")
    except ValueError as error:
        logger.warning("%s is damaged (%s): the scores are computed again", path, one_line(error))
        return None
    return scores


def keep_scores(directory: Path, scores: LayerScores, what: str) -> None:
    """Saves the scores of a run, and notes their checksum.

    Args:
        directory: the directory of the run.
        scores: its scores.
        what: what they are, for the message.

    Raises:
        ValueError: the run started with other scores.
    """
    noted, path = noted_scores(directory), directory / SCORES_FILE
    if noted is None and path.is_file():
        noted = _checksum(LayerScores.load(path))
    if noted not in (None, _checksum(scores)):
        raise ValueError(
            f"scores: expected the scores that the run in {str(directory)!r} started with, got {what}; set another "
            "--output"
        )
    scores.save(path)
    note(directory, {SCORES_NOTE: _checksum(scores)})


def _checksum(scores: LayerScores) -> str:
    """The checksum of scores; whole numbers in a file are those that the same floats would be."""
    entries: dict[str, Any] = {**asdict(scores), "values": [*map(float, scores.values)]}
    return checksum(json.dumps(entries, sort_keys=True))
