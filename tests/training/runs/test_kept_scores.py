"""A run samples layers by the scores that it started with: an edited file of them is no input of a resumed one."""

import json
from dataclasses import replace

import pytest
import torch

from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.runs.run_directory import claim
from hf_cod.training.runs.trainer import scores_to_draw_by
from hf_cod.training.runs.training_settings import TrainingSettings
from tests.tiny_models import build

GIVEN = {"method": "owlore", "batch_size": 2, "micro_batch_size": 2, "sequence_length": 16}
SETTINGS = TrainingSettings(**GIVEN)
WINDOWS = torch.randint(3, 20, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def run(model, tmp_path):
    """The directory of an interrupted run."""
    claim(tmp_path, {"steps": 4})
    scores_to_draw_by(model, WINDOWS, SETTINGS, None, tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    return tmp_path


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EDITS = {
    "values": lambda path: edited(path, values=[9.0, 1.0, 1.0, 1.0]),
    "settings": lambda path: edited(path, settings={}),
    "half a file": lambda path: path.write_text(path.read_text()[:-9]),
    "another kind": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_scores_are_computed_again(edit, model, run, caplog):
    file = run / "scores.json"
    before = file.read_text()
    EDITS[edit](file)
    scores = scores_to_draw_by(model, WINDOWS, SETTINGS, None, run)
    (line,) = caplog.messages
    assert "scores.json is damaged (" in line and "are computed again" in line and "\n" not in line
    assert file.read_text() == before and scores == LayerScores.load(file)


def test_scores_that_do_not_come_back_are_refused(model, run, caplog):
    """The model has changed meanwhile, or the settings of the run were edited."""
    edited(run / "settings.json", scores_checksum="0" * 16)
    before = (run / "scores.json").read_text()
    with pytest.raises(ValueError, match=r"scores: expected the scores that the run in .* got others of this model; "):
        scores_to_draw_by(model, WINDOWS, SETTINGS, None, run)
    assert (run / "scores.json").read_text() == before and "are computed again" in caplog.text


@pytest.mark.parametrize("checksum", [3, ["x"], True])
def test_a_note_of_another_type(checksum, model, run):
    edited(run / "settings.json", scores_checksum=checksum)
    with pytest.raises(ValueError, match=r"scores_checksum: expected .*, got .* in .*settings\.json"):
        scores_to_draw_by(model, WINDOWS, SETTINGS, None, run)


def test_given_scores_are_those_of_the_start_whatever_the_kept_file_says(model, run, tmp_path_factory):
    file = LayerScores.load(run / "scores.json").save(tmp_path_factory.mktemp("given") / "scores.json")
    edited(run / "scores.json", values=[9.0, 1.0, 1.0, 1.0])
    assert scores_to_draw_by(model, WINDOWS, SETTINGS, file, run) == LayerScores.load(run / "scores.json")
    others = replace(LayerScores.load(file), values=[9.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="started with, got LayerScores; set another"):
        scores_to_draw_by(model, WINDOWS, SETTINGS, others, run)


def test_other_settings_begin_with_other_scores(model, run):
    (run / "checkpoint-2").rmdir()
    claim(run, {"steps": 5})
    assert not (run / "scores.json").exists()
    others = TrainingSettings(**GIVEN, score="angular")
    assert scores_to_draw_by(model, WINDOWS, others, None, run).method == "angular"


def test_a_run_of_an_earlier_version_has_no_checksum(model, run, caplog):
    settings = json.loads((run / "settings.json").read_text())
    del settings["scores_checksum"]
    (run / "settings.json").write_text(json.dumps(settings))
    mine = LayerScores.load(run / "scores.json")
    with pytest.raises(ValueError, match="started with, got LayerScores; set another"):
        scores_to_draw_by(model, WINDOWS, SETTINGS, replace(mine, values=[9.0, 1.0, 1.0, 1.0]), run)
    assert scores_to_draw_by(model, WINDOWS, SETTINGS, None, run) == mine and not caplog.messages
    assert json.loads((run / "settings.json").read_text()).keys() == {"steps", "scores_checksum"}
