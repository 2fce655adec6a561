"""One way to be told: a settings object, its fields, or both; and old names of arguments."""

import inspect
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest

import hf_cod
from hf_cod import (
    AllocationSettings,
    Applying,
    DepthPlan,
    DepthSettings,
    DiagnoseSettings,
    DropLayersSettings,
    FactorizeSettings,
    FitPlan,
    FitSettings,
    HealSettings,
    LayerAllocation,
    LayerMonitor,
    LayerSampler,
    LayerScores,
    LayerStatistics,
    LoraRankSettings,
    NarrowSettings,
    OwLoreAdamW,
    OwLoreSettings,
    PackSettings,
    PruneSettings,
    RankPlan,
    RankSettings,
    SamplerSettings,
    SampleSettings,
    ScoreSettings,
    SparseConfig,
    StorageSettings,
    WidthSettings,
    allocate,
    diagnose,
    drop,
    drop_layers,
    factorize,
    find_decoder_layers,
    lora_ranks,
    narrow,
    owlore,
    pack_sparse,
    plan_bits,
    plan_depth,
    plan_fit,
    plan_ranks,
    plan_width,
    prune,
    quantize,
    score_layers,
    skip,
    token_batches,
)
from hf_cod.compression.depth import criteria
from hf_cod.compression.depth import settings as depth_settings
from hf_cod.compression.fit import knobs
from hf_cod.compression.fit import settings as fit_settings
from hf_cod.compression.low_rank import factorizer
from hf_cod.compression.low_rank import settings as low_rank_settings
from hf_cod.compression.pruning import methods as pruning_methods
from hf_cod.compression.pruning import settings as pruning_settings
from hf_cod.compression.width import methods as width_methods
from hf_cod.compression.width import settings as width_settings
from hf_cod.functional import bits, codebook
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import as_in, resolve
from hf_cod.scoring import allocation, expert_methods
from hf_cod.scoring import methods as scoring_methods
from hf_cod.scoring import settings as scoring_settings
from hf_cod.training.runs import methods as training_methods
from hf_cod.training.runs import training_settings
from tests.tiny_models import batch_for, build
from tests.tiny_tokenizers import gpt_like

ROOT = Path(hf_cod.__file__).parent
SETTINGS = sorted([*ROOT.rglob("settings.py"), *ROOT.rglob("*_settings.py")])
TEXT = "one two three four five six seven eight nine ten " * 30


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(bool((tensor == other[name]).all()) for name, tensor in one.items())


def test_fields_replace_those_of_the_object_which_stays_as_it_was():
    given = SampleSettings(sequence_length=8, seed=3)
    found = resolve(token_batches, SampleSettings, given, {"seed": 5}, batch_size=2, max_samples=None)
    assert found == SampleSettings(sequence_length=8, seed=5, batch_size=2)
    assert given == SampleSettings(sequence_length=8, seed=3)
    copied = resolve(token_batches, SampleSettings, given, {})
    assert copied == given and copied is not given
    assert resolve(token_batches, SampleSettings, None, {}) == SampleSettings()


def test_settings_of_a_subclass_keep_what_they_have_beside():
    given = DiagnoseSettings(metrics=["layer_drop"])
    found = resolve(token_batches, SampleSettings, given, {"seed": 5})
    assert found == replace(given, seed=5)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda model: prune(model, 0.5, metod="wanda"),
            "prune: did you mean method\\? expected one of method, .*, got 'metod'$",
        ),
        (lambda model: prune(model, 0.5, "magnitude", bathces=[]), "prune: did you mean batches\\?.* got 'bathces'"),
        (lambda model: prune(model, 0.5, settings="wanda"), "settings: expected PruneSettings or None, got 'wanda'"),
        (lambda model: prune(model, 0.5, zzz=1), "prune: expected one of .*, got 'zzz'$"),
        (lambda model: prune(model, 0.5, settings=PruneSettings("x")), "method: expected one of magnitude, wanda"),
        (
            lambda model: score_layers(model, method="angula"),
            "method: did you mean angular\\? expected one of owl, .*, got 'angula'$",
        ),
        (
            lambda model: score_layers(model, gpt_like(), [TEXT]),
            "statistics: expected LayerStatistics or None, got .*; pass tokenizer=..., texts=...$",
        ),
        (lambda model: quantize(model, 3.5), r"OwlBnbConfig or None, got 3.5; pass OwlBnbConfig\(bits=3.5\)$"),
        (
            lambda model: diagnose(model, batches=[TEXT]),
            r"got str as batch 0; hf_cod.token_batches\(tokenizer, texts\) makes them from texts$",
        ),
        (lambda model: OwLoreAdamW(model, moments="8bits"), "moments: did you mean 8bit\\? .*, got '8bits'$"),
        (lambda model: OwLoreAdamW(model, n_activ=1), "OwLoreAdamW: did you mean n_active\\?.* got 'n_activ'"),
        (lambda model: LayerMonitor(model, "text", evry=1), "LayerMonitor: did you mean every\\?.* got 'evry'"),
        (lambda model: plan_bits(model, 3.5, settings=SampleSettings()), "settings: expected StorageSettings"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("llama"))


def test_an_object_and_fields_prune_alike():
    kept = {}
    batches = [batch_for(build("llama"))]
    for name, given in (
        ("object", {"settings": PruneSettings("sparsegpt")}),
        ("field", {"method": "sparsegpt"}),
        ("both", {"settings": PruneSettings("magnitude"), "method": "sparsegpt"}),
    ):
        model = build("llama")
        assert prune(model, 0.5, batches=batches, **given).settings["method"] == "sparsegpt"
        kept[name] = weights(model)
    by_position = build("llama")
    prune(by_position, 0.5, "sparsegpt", batches=batches)
    assert all(same(weights(by_position), found) for found in kept.values())


def test_an_object_and_fields_score_and_distribute_alike():
    model = build("llama")
    batches = [batch_for(model)]
    given = ScoreSettings("owl", threshold=3.0, per_module=True)
    scores = score_layers(model, settings=given, batches=batches)
    assert scores == score_layers(model, method="owl", threshold=3.0, per_module=True, batches=batches)
    assert scores.settings == {"threshold": 3.0, "per_module": True}
    given = ScoreSettings("random", threshold=3.0)
    assert scores == score_layers(model, settings=given, method="owl", per_module=True, batches=batches)
    plan = allocate(scores, settings=AllocationSettings("rank", 0.6, 0.1))
    assert plan == allocate(scores, "rank", 0.6, 0.1) == allocate(scores, kind="rank", budget=0.6, spread=0.1)
    assert plan.kind == "rank" and plan.mean == pytest.approx(0.6)


def test_an_object_and_fields_diagnose_alike():
    model = build("llama")
    options = {"tokenizer": gpt_like(), "texts": [TEXT], "show_progress": False}
    given = DiagnoseSettings(sequence_length=8, max_samples=3, metrics=["layer_drop"], drop_metric="perplexity")
    one = diagnose(model, **options, settings=given)
    other = diagnose(model, **options, **asdict(given))
    assert (one.layers, one.results, one.settings) == (other.layers, other.results, other.settings)
    assert one.settings["sequence_length"] == 8 and one.settings["drop_metric"] == "perplexity"


def test_an_object_and_fields_plan_and_change_alike():
    model = build("llama")
    batches = [batch_for(model), batch_for(model)]
    depth = [
        plan_depth(model, 1, batches=batches, settings=DepthSettings("search", search_width=2, protect=[3])),
        plan_depth(model, 1, "search", batches=batches, search_width=2, protect=[3]),
    ]
    assert depth[0] == depth[1] and depth[0].protected == [3]
    planned = plan_bits(model, 4, settings=StorageSettings(block=32))
    assert planned == plan_bits(model, 4, block=32)
    assert planned == plan_bits(find_decoder_layers(model), 4, StorageSettings(block=32))
    assert planned.stored < plan_bits(model, 4).stored  # whose rows are no whole blocks of 64
    found = []
    for given in ({"settings": FactorizeSettings("plain")}, {"method": "plain"}):
        changed = build("llama")
        found.append(factorize(changed, 0.5, **given).results)
    assert found[0] == found[1]


def packed(**given):
    model = build("llama")
    prune(model, 0.5, "magnitude")
    return pack_sparse(model, **given).hf_quantizer.quantization_config.min_sparsity


@pytest.mark.parametrize(
    "call, settings, told",
    [
        (
            lambda model, **given: plan_ranks(model, 0.8, batches=[batch_for(model)], **given),
            RankSettings("spectrum"),
            lambda plan: plan.method == "spectrum",
        ),
        (
            lambda model, **given: plan_width(model, 0.7, **given),
            WidthSettings(4),
            lambda plan: any(number % 32 for number in plan.channels),
        ),
        (
            lambda model, **given: lora_ranks(model, score_layers(model, method="depth"), **given),
            LoraRankSettings(4, 0.25),
            lambda ranks: sorted(ranks["rank_pattern"].values()) == [3, 4, 4, 5],
        ),
        (
            lambda model, **given: LayerSampler([2.0, 1.0, 1.0, 1.0], **given).draw(0),
            SamplerSettings(2, seed=3),
            lambda drawn: len(drawn) == 2,
        ),
        (
            lambda model, **given: drop_layers(build("llama"), 1, batches=[batch_for(model)], **given).settings,
            DropLayersSettings("linear"),
            lambda settings: settings["replacement"] == "linear",
        ),
        (
            lambda model, **given: packed(**given),
            PackSettings(min_sparsity=0.25),
            lambda min_sparsity: min_sparsity == 0.25,
        ),
    ],
    ids=["plan_ranks", "plan_width", "lora_ranks", "LayerSampler", "drop_layers", "pack_sparse"],
)
def test_an_object_and_fields_do_alike_where_there_are_few(call, settings, told):
    model = build("llama")
    found = call(model, settings=settings)
    assert told(found) and found == call(model, **asdict(settings))


def test_widths_are_planned_as_narrow_plans_them():
    planned, model = build("llama"), build("llama")
    plan = plan_width(planned, 0.6, channel_multiple=8)
    assert same(weights(planned), weights(build("llama")))
    given = NarrowSettings("magnitude", "none", channel_multiple=8)
    results = narrow(model, 0.6, settings=given).results
    assert (plan.heads, plan.channels) == (results["heads"], results["channels"])
    narrow(planned, plan, "magnitude", "none")
    assert same(weights(planned), weights(model))
    scores = score_layers(build("llama"), method="depth")
    allocated = plan_width(build("llama"), allocate(scores, "parameter_share", 0.6, 0.2), 8)
    assert allocated.method == "depth" and allocated.channels[0] > allocated.channels[-1]
    with pytest.raises(ValueError, match="plan: expected an allocation of parameter_share, got one of rank"):
        plan_width(build("llama"), allocate(scores, "rank", 0.6))
    with pytest.raises(ValueError, match="channel_multiple: expected a whole number above 0, got 0"):
        plan_width(build("llama"), 0.6, 0)


def test_owlore_takes_its_settings_through_trainers_arguments():
    factory, arguments = owlore(None, lr=1e-3, settings=OwLoreSettings(n_active=2, rank=4))
    optimizer = factory()(build("llama"), **arguments)
    assert optimizer.settings == OwLoreSettings(n_active=2, rank=4) and len(optimizer.active) == 2


def test_old_names_are_taken_with_a_warning():
    model = build("llama")
    with pytest.warns(DeprecationWarning, match="find_decoder_layers: path is now called layers_path") as caught:
        found = find_decoder_layers(model, path="model.layers")
    assert found.layers_path == "model.layers" and caught[0].filename == __file__
    with pytest.raises(ValueError, match="path: expected only the new name layers_path, got both names"):
        find_decoder_layers(model, path="model.layers", layers_path="model.layers")
    with pytest.warns(DeprecationWarning, match="skip: path"), skip(model, 0, path="model.layers"):
        pass
    with pytest.warns(DeprecationWarning, match="Applying: path is now called layers_path"):
        assert Applying([], path="model.layers") == Applying([], layers_path="model.layers")
    with pytest.warns(DeprecationWarning, match="narrow: multiple is now called channel_multiple"):
        narrow(build("llama"), 0.6, "magnitude", "none", multiple=8)
    scores = score_layers(model, method="depth")
    with pytest.warns(DeprecationWarning, match="allocate: parameters is now called layer_parameters"):
        assert allocate(scores, parameters=[1] * 4).parameters == [1] * 4
    for call in (
        lambda share: plan_ranks(model, **{share: 0.8}),
        lambda share: plan_width(model, channel_multiple=8, **{share: 0.8}),
    ):
        with pytest.warns(DeprecationWarning, match="plan_.*: parameters is now called parameter_share"):
            assert call("parameters") == call("parameter_share")
    with pytest.warns(DeprecationWarning, match="lora_ranks: width is now called relative_spread"):
        assert lora_ranks(model, scores, width=0.0) == lora_ranks(model, scores, relative_spread=0.0)
    with pytest.warns(DeprecationWarning, match="plan_depth: method is now called criterion"):
        assert plan_depth(model, 1, method="angular", batches=[batch_for(model)]).criterion == "angular"
    with pytest.warns(DeprecationWarning, match="DecoderLayers: path is now called layers_path") as caught:
        assert found.path == "model.layers"
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="LayerStatistics: path is now called layers_path"):
        assert LayerStatistics("m", path="a.b", squares={}, tokens={}).layers_path == "a.b"
    with pytest.warns(DeprecationWarning, match="DepthPlan: method is now called criterion"):
        assert DepthPlan("m", "angular", [1], [1, 1]).method == "angular"
    with pytest.warns(DeprecationWarning, match="FactorizeSettings: rank_share is now called factor_share"):
        chosen = FactorizeSettings(rank_share=0.4)
    with pytest.warns(DeprecationWarning, match="FactorizeSettings: rank_share is now called factor_share"):
        assert chosen.rank_share == chosen.factor_share == 0.4
    with pytest.warns(DeprecationWarning, match="factorize: rank_share is now called factor_share"):
        factorize(build("llama"), 0.6, "oats", batches=[batch_for(model)], rank_share=0.4)
    for settings, old, value in (
        (PackSettings, "minimum", 0.3),
        (SparseConfig, "minimum", 0.3),
        (FitSettings, "verify", 2),
        (HealSettings, "labels", 0.5),
        (HealSettings, "hidden", 0.5),
    ):
        with pytest.warns(DeprecationWarning, match=f"{settings.__name__}: {old} is now called"):
            chosen = settings(**{old: value})
        with pytest.warns(DeprecationWarning, match=f"{old} is now called"):
            assert getattr(chosen, old) == value
    with pytest.warns(DeprecationWarning, match="pack_sparse: minimum is now called min_sparsity"):
        assert packed(minimum=0.3) == 0.3
    with pytest.warns(DeprecationWarning, match="plan_fit: verify is now called n_verified"), pytest.raises(ValueError):
        plan_fit(lambda: model, "bits", 3.0, [], [], verify=1)
    with pytest.warns(DeprecationWarning, match="drop: path"):
        assert drop(model, 1, path="model.layers") == [0, 2, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: allocate(LayerScores("m", "depth", [2.0, 1.0], [1, 1]), kind, 0.8),
        lambda kind: AllocationSettings(kind),
        lambda kind: LayerAllocation(kind, 0.8, [0.7, 0.9], [1, 1], "depth"),
        lambda kind: RankPlan(kind, 0.8, {}, "mine"),
        lambda kind: FitPlan(
            kind, 0.8, {}, 1.0, 1.0, dict.fromkeys(("bytes", "layer_bytes", "layer_weights"), 9), {}, [], []
        ),
    ],
    ids=["allocate", "AllocationSettings", "LayerAllocation", "RankPlan", "FitPlan"],
)
def test_a_share_of_parameters_is_called_so_and_its_old_kind_is_taken(make, tmp_path):
    with pytest.warns(DeprecationWarning, match="kind: parameters is now called parameter_share") as caught:
        old = make("parameters")
    assert old.kind == "parameter_share" and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert make("parameter_share") == old
        if hasattr(old, "save"):  # an earlier file is nobody's mistake
            earlier = tmp_path / "earlier.json"
            earlier.write_text(old.save(tmp_path / "now.json").read_text().replace("parameter_share", "parameters"))
            assert type(old).load(earlier) == type(old).load(tmp_path / "now.json") == old


def test_new_names_do_not_warn_and_signatures_show_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert find_decoder_layers(build("llama"), layers_path="model.layers").layers_path == "model.layers"
    assert [*inspect.signature(find_decoder_layers).parameters] == ["model", "layers_path", "stack"]
    assert "layers_path" in inspect.signature(Applying).parameters

    @renamed(old="new")
    def function(new):
        """What it does."""
        return new

    assert function.__doc__ == "What it does." and function(1) == function(new=1) == 1


def test_no_public_argument_has_a_name_that_means_two_things():
    """`path` was the layers' module list; `width` a search's and a spread; `limit` a number of samples."""
    old = {"path", "width", "multiple", "limit", "storage"}
    files = {"TrainingHistory"}  # whose path is that of a file
    for name in set(hf_cod.__all__) - files:
        thing = getattr(hf_cod, name)
        if not callable(thing):
            continue
        assert not old & set(inspect.signature(thing).parameters), name
        if is_dataclass(thing):
            assert not old & {field.name for field in fields(thing)}, name


def test_functions_take_settings_in_one_way():
    """Who takes fields by name takes the object, too; only data has names of its own.

    The other way round, `tests/test_public_api.py` checks that each field of the object is an argument.
    """
    other_names = {
        "quantize": "config",  # transformers' object
        "apply_steps": "how",  # what the steps work on
        "collect_statistics": "samples",  # of texts, without other settings
        "perplexity": "samples",
        "measure_swap": "samples",
    }
    passed_on = {"owlore", "llama_preset", "OwlBnbConfig", "SparseConfig"}  # fields of somebody else
    for name in set(hf_cod.__all__) - passed_on:
        thing = getattr(hf_cod, name)
        if not callable(thing) or is_dataclass(thing):
            continue
        parameters = inspect.signature(inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing)).parameters
        takes_fields = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert not takes_fields or other_names.get(name, "settings") in parameters, name


def test_each_field_has_one_help_text():
    for name in hf_cod.__all__:
        if name.endswith("Settings"):
            thing = getattr(hf_cod, name)
            assert all(field.metadata.get("help") for field in fields(thing)), name
    copied = as_in(ScoreSettings, "threshold")
    assert copied.default == 5.0 and copied.metadata["help"].startswith("owl: outliers")


@pytest.mark.parametrize(
    "told, done",
    [
        (scoring_settings.METHODS, scoring_methods.METHODS),
        (scoring_settings.EXPERT_METHODS, expert_methods.METHODS),
        (scoring_settings.KINDS, allocation.FALLING),
        (pruning_settings.METHODS, pruning_methods.METHODS),
        (low_rank_settings.METHODS, factorizer.METHODS),
        (width_settings.METHODS, width_methods.METHODS),
        (width_settings.COMPENSATIONS, width_methods.COMPENSATIONS),
        (depth_settings.CRITERIA, criteria.CRITERIA),
        (fit_settings.KNOBS, knobs.KNOBS),
        (training_settings.METHODS, training_methods.METHODS),
        (training_settings.LEARNING_RATES, training_methods.METHODS),
        (dict.fromkeys(bits.BITS), codebook.CODEBOOKS),
    ],
)
def test_what_is_told_is_what_there_is(told, done):
    assert [*told] == [*done]


def test_settings_need_neither_torch_nor_transformers():
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in SETTINGS]
    assert "hf_cod.scoring.settings" in names and len(names) > 12
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; "
    code += "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plans_of_fit_are_told_by_fields():
    with pytest.raises(ValueError, match=r"knobs: expected some of depth, .*, got 'x'"):
        plan_fit(lambda: build("llama"), "bits", 4.0, [{}], [{}], knobs=["x"])
