import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import hf_cod
import hf_cod.models

# Function -> the dataclass of its options, and its other arguments: what it works on and what it reports to.
OPTIONS = {
    "LayerDiagnosticsCallback": ("MonitorSettings", "probe output_dir watch"),
    "LayerMonitor": ("MonitorSettings", "model probe tokenizer history step last"),
    "LayerSampler": ("SamplerSettings", "scores layers"),
    "OwLoreAdamW": ("OwLoreSettings", "model scores lr betas eps weight_decay"),
    "allocate": ("AllocationSettings", "scores layer_parameters expert_scores"),
    "apply_steps": ("Applying", "model steps tokenizer texts"),
    "collect_statistics": (
        "SampleSettings",
        "model batches tokenizer texts layers_path name show_progress",
    ),
    "diagnose": ("DiagnoseSettings", "model tokenizer texts batches tasks output journal name show_progress"),
    "drop_experts": ("DropExpertsSettings", "model plan scores batches tokenizer texts layers_path name show_progress"),
    "drop_layers": ("DropLayersSettings", "model plan batches tokenizer texts layers_path name"),
    "evaluate_tasks": ("TaskSettings", "model tokenizer tasks"),
    "export": (
        "ExportSettings",
        "model output scores plan statistics batches tokenizer texts journal layers_path name show_progress",
    ),
    "factorize": ("FactorizeSettings", "model plan batches tokenizer texts journal layers_path name show_progress"),
    "heal": (
        "HealSettings",
        "student teacher data batches tokenizer texts teacher_tokenizer held_out sampling scores output name",
    ),
    "load_texts": ("TextSettings", ""),
    "lora_ranks": ("LoraRankSettings", "model scores"),
    "measure_generation_drop": ("GenerationSettings", "model tokenizer tasks journal layers_path show_progress"),
    "measure_swap": (
        "SampleSettings",
        "model donor batches tokenizer texts metric output journal layers_path name donor_name show_progress",
    ),
    "narrow": ("NarrowSettings", "model plan batches tokenizer texts journal layers_path name show_progress"),
    "pack_sparse": ("PackSettings", "model"),
    "perplexity": ("SampleSettings", "model batches tokenizer texts"),
    "plan_bits": ("StorageSettings", "model bits scores skip include exclude layers_path expert_scores"),
    "plan_depth": ("DepthSettings", "model n_removed batches tokenizer texts journal layers_path show_progress"),
    "plan_experts": ("PlanExpertsSettings", "model share scores batches tokenizer texts layers_path show_progress"),
    "plan_fit": (
        "FitSettings",
        "make kind budget calibration tuning tokenizer texts journal layers_path show_progress",
    ),
    "plan_ranks": ("RankSettings", "model parameter_share batches tokenizer texts journal layers_path show_progress"),
    "plan_width": ("WidthSettings", "model parameter_share layers_path"),
    "plan_repeat": ("RepeatSettings", "model batches tokenizer texts journal layers_path show_progress"),
    "prune": ("PruneSettings", "model plan batches tokenizer texts statistics journal layers_path name show_progress"),
    "quantize": ("OwlBnbConfig", "model batches tokenizer texts journal layers_path name show_progress"),
    "recover": ("RecoverySettings", "model batches tokenizer texts layers_path show_progress"),
    "score_experts": ("ExpertScoreSettings", "model statistics batches tokenizer texts show_progress"),
    "score_layers": ("ScoreSettings", "model statistics batches tokenizer texts journal show_progress"),
    "search_plan": ("SearchSettings", "model batches tokenizer texts scores journal layers_path show_progress"),
    "token_batches": ("SampleSettings", "tokenizer texts"),
}
# These take what they work on alone; `llama_preset` and `owlore` hand fields on, `SparseLinear` is a module.
WITHOUT = (
    "LnsAnnealing MeasurementError SparseLinear TrainingHistory compare drop find_decoder_layers fold_lns from_authors "
    "import_plan import_scores llama_preset owlore repeat repeat_layers repeated skip split_samples to_gpas "
    "to_layer_scale to_lns"
)
OTHER_NAMES = {
    "quantize": "config",
    "apply_steps": "how",
    **dict.fromkeys(("collect_statistics", "measure_swap", "perplexity"), "samples"),
}
# Functions that take texts take these; where a function has samples in its own settings, it lacks some of them.
OWN_SAMPLES = {"diagnose": {"samples"}, "heal": {"samples", "max_samples", "pack", "seed"}}
SAMPLES = ["samples", *(field.name for field in fields(hf_cod.SampleSettings))]


def test_every_public_name_is_there_and_documented():
    for name in hf_cod.__all__:
        thing = getattr(hf_cod, name)
        assert inspect.getdoc(thing), name
    assert hf_cod.__all__ == sorted(hf_cod.__all__)
    assert set(hf_cod.__all__) <= set(dir(hf_cod))


@pytest.mark.parametrize("package", [hf_cod, hf_cod.models])
def test_editors_see_what_is_imported_when_it_is_used(package):
    """The block for type checkers and the table of lazy names say the same."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    if package is hf_cod:
        assert {name: f"hf_cod.{home}" for name, home in hf_cod._HOMES.items()} == seen
    else:
        assert {name: file for file, names in hf_cod.models._NAMES.items() for name in names} == seen
    assert set(package.__all__) == seen.keys() - {"OwLoreConfig"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_cod' has no attribute 'prun'"):
        _ = hf_cod.prun
    with pytest.raises(AttributeError, match=r"module 'hf_cod\.models' has no attribute 'CodGpt'"):
        _ = hf_cod.models.CodGpt


def test_every_public_function_has_its_place_in_the_table_of_options():
    found = {n for n in hf_cod.__all__ if callable(getattr(hf_cod, n)) and not is_dataclass(getattr(hf_cod, n))}
    assert found == OPTIONS.keys() | set(WITHOUT.split())


@pytest.mark.parametrize("name", OPTIONS)
def test_functions_take_their_options_as_one_dataclass_or_its_fields(name):
    function, (title, own) = getattr(hf_cod, name), OPTIONS[name]
    kind, parameters = getattr(hf_cod, title), inspect.signature(function).parameters
    options = [field.name for field in fields(kind) if field.init]
    given = OTHER_NAMES.get(name, "settings")
    assert re.search(rf"\b{title}\b", parameters[given].annotation) and parameters[given].default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values()), "an editor must see the fields by name"
    assert {*options} <= parameters.keys(), "a field that cannot be passed by name"
    samples = SAMPLES if "samples" in parameters else []
    named = ["stack"] if "layers_path" in parameters else []
    assert parameters.keys() <= {*own.split(), given, *options, *samples, *named}, (
        "an option that is no field of the dataclass"
    )
    missing = {n: None for n, p in parameters.items() if p.default is p.empty}
    with pytest.raises(ValueError) as raised:
        function(**missing, zzz=1)
    said = re.fullmatch(rf"{name}: expected one of (.*), got 'zzz'", str(raised.value))
    assert said and said[1].split(", ")[: len(options)] == options, "the keywords are not those of the dataclass"


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - OTHER_NAMES.keys()))
def test_options_stand_in_the_settings_of_their_folder(name):
    """Which import neither torch nor transformers (tests/io/test_settings.py)."""
    kind = getattr(hf_cod, OPTIONS[name][0])
    assert kind.__module__.rpartition(".")[2].endswith("settings")
    assert all(field.metadata.get("help") for field in fields(kind) if field.init)


def test_functions_that_take_batches_take_texts_alike():
    """One or the other, with the same names; `tests/layers/test_batches.py` compares the results."""
    taking = {"batches", "calibration", "tuning", "data"}
    for name in sorted({*OPTIONS, *WITHOUT.split()} - {"split_samples"}):
        parameters = inspect.signature(getattr(hf_cod, name)).parameters
        if taking & parameters.keys():
            assert {"tokenizer", "texts"} <= parameters.keys(), name
            missing = set(SAMPLES) - parameters.keys()
            assert missing == OWN_SAMPLES.get(name, set()), name
            for one in {*taking, "tokenizer", "texts", "samples"} & parameters.keys():
                assert parameters[one].default is None, f"{name}: {one}"
            assert "token_batches" in inspect.getdoc(getattr(hf_cod, name)), f"{name}: how batches are made"


@pytest.mark.parametrize("name", sorted({*OPTIONS, *WITHOUT.split(), "Applying"} - {"MeasurementError"}))
def test_paths_are_also_taken_as_strings(name):
    for parameter in inspect.signature(getattr(hf_cod, name)).parameters.values():
        kinds = {part.strip().rpartition(".")[2] for part in str(parameter.annotation).split("|")}
        assert "Path" not in kinds or "str" in kinds, f"{name}: {parameter}"
