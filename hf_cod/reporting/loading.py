"""Instructions for loading a saved model or adapter: lines of Python, and the packages that they require."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.models.auto import modeling_auto

from hf_cod.io.adapters import ADAPTER, read_adapter_config
from hf_cod.io.files import looks_local
from hf_cod.io.markdown import escaped
from hf_cod.io.model_config import find_model_config, read_model_config
from hf_cod.io.models import EMBEDDED, EMBEDDED_PLACEMENTS
from hf_cod.io.requirements import requirement
from hf_cod.models.stored_config import REQUIRES

# Auto class -> (its table of class names in transformers, pipeline_tag of the Hub); the first match is used.
AUTO_CLASSES = {
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "text2text-generation"),
    "AutoModelForSpeechSeq2Seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "automatic-speech-recognition"),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "fill-mask"),
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
    "AutoModelForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text-classification"),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token-classification"),
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "question-answering"),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "multiple-choice"),
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image-classification"),
    "AutoModel": ("MODEL_MAPPING_NAMES", "feature-extraction"),
}
# Quantization method -> the extra of hf_cod that its weights require.
EXTRAS = {"owl_bnb": "bitsandbytes", "hf_cod_sparse": None}
# The same -> packages other than hf_cod that its weights require.
PACKAGES = {"compressed-tensors": ("compressed-tensors",)}
PEFT = "recovery"  # the extra with peft
OWLORE = "OWLORE"  # as 0.1 named it
OWN_PREFIXES = ("Shaped", "Cod")
# File -> (variable, class that reads it); the first file that exists is used.
PROCESSORS = {
    "processor_config.json": ("processor", "AutoProcessor"),
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
}


@dataclass(frozen=True)
class Loading:
    """Instructions for loading a model or an adapter.

    Attributes:
        python: the lines of Python.
        install: the shell command that installs the required packages.
        remarks: sentences about loading.
        library: library_name of the Hub.
        pipeline_tag: pipeline_tag of the Hub.
        base: the base model of an adapter, as its config names it; None for a model.
    """

    python: str
    install: str
    remarks: list[str]
    library: str
    pipeline_tag: str
    base: str | None = None


@dataclass(frozen=True)
class _Needs:
    """Requirements of a checkpoint according to its config: hf_cod with extras, custom code, an Auto class."""

    ours: bool
    extras: tuple[str, ...]
    code: bool
    auto: str
    packages: tuple[str, ...] = ()


def loading_of(directory: str | Path, name: str) -> Loading:
    """Instructions for loading the model or adapter in a directory.

    Args:
        directory: a directory with a config.json or an adapter_config.json.
        name: Hub id or path to use in the lines of Python.

    Raises:
        ValueError: the config cannot be read; names the file.
    """
    directory = Path(directory)
    if (directory / ADAPTER).is_file():
        return _adapter(read_adapter_config(directory / ADAPTER), name)
    needs = _needs(read_model_config(directory / "config.json"))
    there = [kind for file, kind in PROCESSORS.items() if (directory / file).is_file()]
    # Older processors have no file of their own, but those of their parts.
    found = ("processor", "AutoProcessor") if len(there) > 1 else next(iter(there), None)
    lines = [*_imports(needs, found), "", _load("model", needs, name)]
    if found is not None:
        lines.append(f"{found[0]} = {found[1]}.from_pretrained({json.dumps(name)}{_code(needs)})")
    return Loading("\n".join(lines), _install(needs), _remarks(needs), "transformers", AUTO_CLASSES[needs.auto][1])


def public_name(source: str) -> str:
    """A Hub id unchanged; of a path only the last part, so that local directories are not published.

    Embedded models keep their path in the repository.
    """
    path = Path(source).expanduser()
    if path.name in EMBEDDED_PLACEMENTS and path.resolve().parent == EMBEDDED.resolve():
        return f"hf_cod/assets/{EMBEDDED.name}/{path.name}"
    return path.name or path.resolve().name if path.exists() or looks_local(source) else source


def hub_id(source: str) -> str | None:
    """The name if it is a Hub id; None for a path."""
    if not source or Path(source).expanduser().exists() or looks_local(source) or source.endswith(".gguf"):
        return None
    try:
        validate_repo_id(source)
    except ValueError:
        return None
    return source


def _adapter(config: dict[str, Any], name: str) -> Loading:
    base = str(config.get("base_model_name_or_path") or "")
    beneath = _needs(_config_of(base), (config.get("auto_mapping") or {}).get("base_model_class"))
    needs = beneath
    if config.get("peft_type") in (REQUIRES, OWLORE):
        needs = replace(beneath, ours=True, extras=(*beneath.extras, PEFT))
    words = not AUTO_CLASSES[needs.auto][1].startswith("image-class")
    lines = [*_imports(needs, ("tokenizer", "AutoTokenizer") if words else None, "from peft import PeftModel"), ""]
    lines.append(_load("base", needs, public_name(base)))
    lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(name)})")
    if words:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(public_name(base))})")
    beside = f"This is an adapter: it also requires the weights of {escaped(public_name(base))}."
    remarks = [beside, *_remarks(needs)]
    return Loading("\n".join(lines), _install(needs, "peft"), remarks, "peft", AUTO_CLASSES[needs.auto][1], base)


def _config_of(base: str) -> dict[str, Any]:
    """The config of an adapter's base model if it is available locally, else {}."""
    try:
        found = find_model_config(base, local=True)
        return {} if found is None else read_model_config(found)
    except (OSError, ValueError):
        return {}


def _needs(config: dict[str, Any], architecture: str | None = None) -> _Needs:
    method = str((config.get("quantization_config") or {}).get("quant_method"))
    named = (config.get("architectures") or [architecture or ""])[0]
    extra = EXTRAS.get(method)
    ours = method in EXTRAS
    code = "auto_map" in config and not ours
    return _Needs(ours, (extra,) if extra else (), code, _auto_class(named), PACKAGES.get(method, ()))


def _auto_class(architecture: str) -> str:
    """The Auto class for a model class of transformers or hf_cod, given by name."""
    names = {architecture, *(architecture.removeprefix(prefix) for prefix in OWN_PREFIXES)}
    for auto, (table, _) in AUTO_CLASSES.items():
        for known in getattr(modeling_auto, table).values():
            if names & set(known if isinstance(known, tuple) else (known,)):
                return auto
    return "AutoModelForCausalLM"


def _imports(needs: _Needs, processor: tuple[str, str] | None, *others: str) -> list[str]:
    classes = [needs.auto, *([] if processor is None else [processor[1]])]
    ours = ["import hf_cod  # before from_pretrained: registers its formats"] if needs.ours else []
    return [*ours, *others, f"from transformers import {', '.join(classes)}"]


def _load(variable: str, needs: _Needs, name: str) -> str:
    return f"{variable} = {needs.auto}.from_pretrained({json.dumps(name)}{_code(needs)})"


def _code(needs: _Needs) -> str:
    """Also for the tokenizer, since transformers reads the model's config for it, and asks."""
    return ", trust_remote_code=True" if needs.code else ""


def _install(needs: _Needs, *others: str) -> str:
    """With the lowest versions that are tested: a config.json of transformers 5 means other things to version 4."""
    if needs.ours:
        added = [each for each in others if PEFT not in needs.extras]
        packages = [requirement("hf_cod", *needs.extras), *map(requirement, added)]
    else:
        packages = ["torch", *map(requirement, ("transformers", *needs.packages, *others))]
    return shlex.join(["pip", "install", *packages])


def _remarks(needs: _Needs) -> list[str]:
    if needs.ours:
        return ["Loading requires hf_cod; without it, loading fails with an error that says so."]
    if needs.code:
        return [
            "The directory contains the code of its modules, which `trust_remote_code=True` runs. If hf_cod is "
            "installed, `import hf_cod` before loading replaces `trust_remote_code=True`."
        ]
    return ["This is a stock checkpoint: hf_cod is not required."]
