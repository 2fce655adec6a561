"""Work that earlier versions left interrupted resumes, as tests/test_earlier_files.py says of their other files."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_cod import LayerScores, RunReport
from hf_cod.cli import main
from tests.earlier_files.read import EXPECTED, VERSIONS, cases, check_logits, copy_to, same_libraries

LAYER_BY_LAYER = ("prune", "quantize", "factorize", "narrow")
TRAININGS = ("finetune", "finetune-peft", "heal")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    def copy(version):
        folder = copy_to(tmp_path, version)
        monkeypatch.chdir(folder)
        return folder

    return copy


def mark_layers(run):
    """Tells of each finished layer that a matrix received no tokens, which no work anew would."""
    marked = []
    for file in sorted((run / "journal").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            note = json.loads(opened.metadata()["note"])
        if note is None:  # what was measured, and not changed
            continue
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        errors = [] if isinstance(note, list) else note["errors"]
        if errors == {}:  # no matrix of this layer was changed
            continue
        matrix = f"model.layers.{int(file.stem[-5:])}.mlp.down_proj"
        marked.append(matrix if isinstance(errors, list) else [*errors][-1])
        (note if isinstance(note, list) else note["unseen"]).append(marked[-1])
        if run.name == "narrow":  # without tokens no error
            errors.pop()
        elif run.name == "quantize":
            del errors[marked[-1]]
        save_file(tensors, file, {"note": json.dumps(note)})
    assert marked
    return lambda report, whole: all(any(name in note for note in report.notes) for name in marked)


def mark_lines(file, change):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        change(line)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def mark_diagnose(run, whole):
    def change(line):
        if line[1] == "gradient_norm":
            line[2][0] = 99.0

    mark_lines(run / "journal.jsonl", change)
    return lambda report, whole: report.layers["gradient_norm"] == [99.0, *whole.layers["gradient_norm"][1:]]


def mark_drop_layers(run, whole):
    """The removal of a layer that no candidate removes costs still more."""
    removed = {layer for found in whole.results["candidates"].values() for layer in found["layers"]}
    layer = min(set(range(4)) - removed)

    def change(line):
        if line[1].startswith("without") and line[1].endswith(f" {layer}"):
            line[2][0][0] += 100.0

    mark_lines(run / "journal" / "journal.jsonl", change)
    return lambda report, whole: report.layers["cost"][layer] > whole.layers["cost"][layer] + 1


def mark_fit(run, whole):
    def change(line):
        if line[1] == "trial rank 0.05":
            line[2][0] = 9.0

    mark_lines(run / "journal" / "trials.jsonl", change)
    return lambda report, whole: report.results["plan"]["alone"]["rank"]["losses"][0] == 9.0


def mark_training(run, whole):
    (file,) = run.glob("checkpoint-*/trainer_state.json")
    state = json.loads(file.read_text())
    state["log_history"][0]["loss"] = 99.0
    file.write_text(json.dumps(state))
    return lambda report, whole: report.results["curve"][0] == [1, 99.0] and len(report.results["curve"]) == 6


# Keys of results that 0.1 used for one thing in one command and for another in the next -> what stands there since.
RENAMED = {
    "bytes": {"disk_bytes"},
    "size": {"memory_bytes", "layer_bytes", "layer_weights"},
    "memory": {"training_memory"},
    "recovered": {"recovered_share"},
    "score": {"score_settings"},
}
RENAMED_IN = {
    "factorize": {"kept": {"parameter_share"}, "rank": {"full_rank_share"}},
    "narrow": {"kept": {"parameter_share"}},
    "prune": {"modules": {"module_sparsity"}},
    "quantize": {"modules": {"module_bits"}, "bytes": {"planned_bytes"}},
}
# The same for measures by layer.
RENAMED_LAYERS = {"kept": "parameter_share", "rank": "full_rank_share"}
# Runs whose later draws find new bases: those have had one sign since 0.2, so that a resumed training goes on from its
# checkpoint, but not to the bits of 0.1.
REDRAWN = ("finetune", "finetune-peft", "heal")
MARKS = {"diagnose": mark_diagnose, "drop-layers": mark_drop_layers, "fit": mark_fit}
MARKS |= dict.fromkeys(LAYER_BY_LAYER, lambda run, whole: mark_layers(run)) | dict.fromkeys(TRAININGS, mark_training)


@pytest.mark.filterwarnings("default:option. .* is now called :DeprecationWarning")
@pytest.mark.parametrize("version, name", cases(lambda version: EXPECTED[version]["runs"]))
def test_interrupted_runs_resume(version, name, copied):
    """By the same command, elsewhere: what was done is taken as it is, and the end is that of an uninterrupted run."""
    if name == "heal" and not same_libraries(version):
        pytest.skip("another transformers changes what a model's config says, and heal refuses a changed student")
    folder = copied(version)
    run, whole = folder / "runs" / name, RunReport.load(Path("reports", name))
    taken = MARKS[name](run, whole)
    assert main(EXPECTED[version]["runs"][name]["command"]) == 0
    report = RunReport.load(run)
    if name in TRAININGS or same_libraries(version):
        assert taken(report, whole), report.notes
    names = {**RENAMED, **RENAMED_IN.get(name, {})}
    renamed = set().union(*(names.get(key, {key}) for key in whole.results))
    assert {RENAMED_LAYERS.get(key, key) for key in whole.layers} <= set(report.layers)
    assert renamed <= set(report.results)
    assert not list(run.glob("checkpoint-*")) and not (run / "journal").exists()
    if name != "diagnose":
        close = 0.1 if name in REDRAWN else 1e-4
        check_logits(version, f"runs/{name}", AutoModelForCausalLM.from_pretrained(run), close)


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_of_a_finished_score_are_taken(version, copied):
    run = copied(version) / "runs" / "score"
    before = (run / "statistics.safetensors").stat().st_mtime_ns
    assert main([*EXPECTED[version]["score"]["command"], "--threshold", "2"]) == 0
    if same_libraries(version):
        assert (run / "statistics.safetensors").stat().st_mtime_ns == before
    assert (run / "earlier-1" / "scores.json").is_file()
    assert LayerScores.load(run / "scores.json").settings["threshold"] == 2
