import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_cod
from hf_cod.models import FAMILIES, CodLlamaForCausalLM, CodLlamaModel
from tests.fresh_processes import run_fresh

from .tiny import BY_TYPE, inputs, tiny_config, tiny_model, tokens

TEXT_AUTOS = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


def first(output) -> torch.Tensor:
    return next(value for value in output.to_tuple() if torch.is_tensor(value))


STRANGER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification
root, out = sys.argv[1:3]
logits = {}
for name, auto, inputs in torch.load(f"{root}/jobs.pt"):
    model = globals()[auto].from_pretrained(f"{root}/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    logits[name] = model(**inputs).to_tuple()[0].detach()
    if name == "cod_llama-lns":  # and on to the next stranger
        model.save_pretrained(f"{root}/resaved")
        torch.manual_seed(7)
        for placement in ("scaled_init", "deepnorm"):
            config = AutoConfig.from_pretrained(f"{root}/{name}", trust_remote_code=True, norm_placement=placement)
            new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            logits[placement] = torch.stack([layer.self_attn.o_proj.weight.std() for layer in new.model.layers])
    if name == "cod_llama-mix":  # a head that was not saved
        head = AutoModelForSequenceClassification.from_pretrained(f"{root}/{name}", trust_remote_code=True)
        assert type(head).__name__ == "CodLlamaForSequenceClassification"
        torch.manual_seed(0)
        assert head(**inputs).logits.shape == (2, 2)
    if name == "cod_llama-lns":  # the config that another stranger saved alone, and saved alone once more
        torch.manual_seed(7)
        config = AutoConfig.from_pretrained(f"{root}/config", trust_remote_code=True)
        config.save_pretrained(f"{root}/config_again")
        logits["config"] = AutoModel.from_config(config, trust_remote_code=True)(**inputs).to_tuple()[0].detach()
        torch.manual_seed(7)
        config = AutoConfig.from_pretrained(f"{root}/config_again", trust_remote_code=True)
        logits["again"] = AutoModel.from_config(config, trust_remote_code=True)(**inputs).to_tuple()[0].detach()
assert "hf_cod" not in sys.modules
torch.save(logits, out)
"""


def stranger(root: Path, out: Path) -> dict[str, torch.Tensor]:
    """Run a fresh process that cannot import this package."""
    (root / "hidden").mkdir(exist_ok=True)
    (root / "hidden" / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    cache = {"HF_MODULES_CACHE": str(root / "modules")}
    done = run_fresh(STRANGER, root, out, cwd=root, paths=[root / "hidden"], environment=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.process
def test_trust_remote_code_without_the_package(tmp_path):
    jobs, expected = [], {}
    for model_type, auto in [
        ("cod_llama-lns", AutoModelForCausalLM),
        ("cod_llama-mix", AutoModelForCausalLM),
        ("cod_qwen2-sandwich", AutoModelForSequenceClassification),
        ("cod_qwen3-lns", AutoModelForTokenClassification),
        ("cod_mistral-deepnorm", AutoModelForQuestionAnswering),
        ("cod_olmo-post", AutoModel),
        ("cod_olmo2-reordered", AutoModelForCausalLM),
        ("cod_vit-lns", AutoModelForImageClassification),
        ("cod_llama-lns_output", AutoModelForCausalLM),
    ]:
        kind, placement = model_type.split("-")
        modified = {"gpas": True, "layer_scale": 0.5} if placement == "lns_output" else {}
        model = tiny_model(kind, placement, auto, **modified)
        model.save_pretrained(tmp_path / model_type)
        jobs.append((model_type, auto.__name__, inputs(kind)))
        expected[model_type] = first(model(**inputs(kind)))
        written = json.loads((tmp_path / model_type / "config.json").read_text())
        autos = {auto.__name__ for auto in BY_TYPE[kind].models} | {"AutoConfig"}
        assert set(written["auto_map"]) == autos
        for reference in written["auto_map"].values():
            assert (tmp_path / model_type / f"{reference.split('.')[0]}.py").is_file()
    torch.save(jobs, tmp_path / "jobs.pt")
    config = tiny_config("cod_qwen3", "mix")
    config.save_pretrained(tmp_path / "config")
    got = stranger(tmp_path, tmp_path / "out.pt")
    for name, logits in expected.items():
        assert torch.equal(got[name], logits), name
    torch.manual_seed(7)
    from_config = AutoModel.from_config(config)
    assert torch.equal(got["config"], from_config(tokens()).last_hidden_state)
    assert torch.equal(got["again"], got["config"])
    # Initialisation reaches the Linears of remote code too.
    assert got["scaled_init"].mean().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert got["deepnorm"].mean().item() == pytest.approx(32**-0.25 * (2 / 64) ** 0.5, rel=0.1)
    # What the stranger saved loads here, with our classes, whether or not the code beside it is trusted.
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "resaved", trust_remote_code=trust)
        assert type(model) is CodLlamaForCausalLM
        assert torch.equal(model(tokens()).logits, expected["cod_llama-lns"])
    second = tmp_path / "second"
    second.mkdir()
    (tmp_path / "resaved").rename(second / "cod_llama-lns")
    (tmp_path / "config").rename(second / "config")
    torch.save(jobs[:1], second / "jobs.pt")
    assert torch.equal(stranger(second, second / "out.pt")["cod_llama-lns"], expected["cod_llama-lns"])


COEXIST = """
import sys, torch
from transformers import AutoModelForCausalLM
path, tokens = sys.argv[1], torch.load(sys.argv[2])
theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(theirs).__module__.startswith("transformers_modules.")
import hf_cod
ours = AutoModelForCausalLM.from_pretrained(path)
both = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(ours) is type(both) is hf_cod.models.CodLlamaForCausalLM
assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
assert torch.equal(hf_cod.fold_lns(ours)(tokens).logits, hf_cod.fold_lns(path)(tokens).logits)
"""


@pytest.mark.process
def test_the_code_beside_the_weights_first_and_the_package_afterwards(tmp_path):
    tiny_model("cod_llama", "lns").save_pretrained(tmp_path / "model")
    torch.save(tokens(), tmp_path / "tokens.pt")
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_fresh(COEXIST, tmp_path / "model", tmp_path / "tokens.pt", cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_pushed_to_the_hub_brings_its_code(tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

    def upload(self, working_dir, repo_id, *args, **kwargs):
        assert repo_id == "someone/tiny"
        shutil.copytree(working_dir, tmp_path / "pushed")

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("x"))
    monkeypatch.setattr("transformers.PreTrainedModel._upload_modified_files", upload)
    model = tiny_model("cod_qwen2", "mix")
    model.push_to_hub("someone/tiny")
    code = {"placements.py", "modifiers.py", "shapes.py", "factors.py", "expert_parameters.py"}
    code |= {f"{kind}_{name}.py" for kind in ("configuration", "modeling") for name in ("cod", "cod_qwen2")}
    assert {path.name for path in (tmp_path / "pushed").glob("*.py")} == code
    written = json.loads((tmp_path / "pushed" / "config.json").read_text())
    autos = {auto.__name__ for auto in TEXT_AUTOS} | {"AutoConfig"}
    assert set(written["auto_map"]) == autos
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pushed")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_the_base_model_alone_can_be_sent_too(tmp_path):
    model = tiny_model("cod_llama", "lns").model
    assert type(model) is CodLlamaModel
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_cod_llama.py").is_file()
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) >= {"AutoModel", "AutoModelForCausalLM"}


def test_files_that_travel_import_nothing_of_ours():
    import ast

    folder = Path(hf_cod.models.__file__).parent
    travelling = [*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")]
    others = ("placements", "modifiers", "shapes", "factors", "expert_parameters")
    travelling += [folder / f"{name}.py" for name in others]
    assert len(travelling) == 2 * (2 + len(FAMILIES)) + 5
    stems = {path.stem for path in travelling}
    for path in travelling:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in stems, (path.name, node.module)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
                assert {name.split(".")[0] for name in names} <= allowed, (path.name, names)
