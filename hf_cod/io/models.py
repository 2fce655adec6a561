"""Loading of a model and its tokenizer from a Hub id, a directory or a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from hf_cod.io.adapters import base_of, check_adapter_files, places, with_adapter
from hf_cod.io.display import one_line
from hf_cod.io.gguf_file import require_gguf
from hf_cod.io.inputs import check_model_path
from hf_cod.io.loading import check_loaded, in_head, load_exactly, read
from hf_cod.io.model_config import building, check_model_config
from hf_cod.io.offloaded import IN_FILES, check_offloadable, offloading_silenced, refuse_in_files, weights_can_change
from hf_cod.io.quantized import forget_quantized, naming_package
from hf_cod.io.settings import ModelFields, ModelSettings, check_effect, resolve

logger = logging.getLogger(__name__)

# Suffix of a class name -> Auto class, for classes that transformers does not have.
HEADS = {
    **dict.fromkeys(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM"),
    **{f"For{head}": f"AutoModelFor{head}" for head in ("MaskedLM", "SequenceClassification", "TokenClassification")},
    **{f"For{head}": f"AutoModelFor{head}" for head in ("QuestionAnswering", "ImageClassification")},
}
EMBEDDED = Path(__file__).parent.parent / "assets" / "pair"
EMBEDDED_PLACEMENTS = ("pre", "lns")
# A model with one of these files has a tokenizer.
TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_TRUST = "trust_remote_code"  # in the errors of transformers about code in a repository


def load_model(
    name: str,
    settings: ModelSettings | None = None,
    *,
    in_files: bool = False,
    **fields: Unpack[ModelFields],
) -> tuple[nn.Module, Any]:
    """Loads a model in eval mode, with the head of its checkpoint, and its tokenizer.

    If config.json names a class with a head but the checkpoint has no weights for it (as with sentence embedders), the
    model is loaded without head: results with a randomly initialised head would be meaningless.

    Args:
        name: a Hub id, a directory, or a path that ends in ".gguf". The directory of an adapter stands for its base
            with the adapter: merged, or as a PEFT model if the base is quantized.
        settings: dtype, device, revision and trust_remote_code.
        in_files: whether the weights stay in the files of the model, on a CPU (`io/offloaded.py`).
        **fields: fields of `ModelSettings` as keywords; they override `settings`.

    Returns:
        The model and the tokenizer (None if the model has none).

    Raises:
        ValueError: the model or its tokenizer does not exist or cannot be read (gives the reason), or weights are
            missing, unexpected or of another shape (`loading.check_loaded`); weights cannot stay in files.
        ImportError: a GGUF file without the gguf package.
    """
    settings = resolve(load_model, ModelSettings, settings, fields)
    source, options = locate(name, settings)
    base = base_of(source)
    if "gguf_file" not in options:
        check_adapter_files(Path(source))
    if in_files:
        check_offloadable(name, source, options, settings.device or best_device(), adapter=base is not None)
    if base is not None:
        model, tokenizer = load_model(base, settings)
        with _naming(name, source, options):
            adapted: Any = with_adapter(model, source).eval()
            adapted.config._name_or_path = source  # scores are of the base with the adapter
            return adapted, _load_tokenizer(name, source, options) or tokenizer
    config = _build_config(name, source, options)
    with naming_package(config, name), _naming(name, source, options):
        load = _load_in_files if in_files else _load_with_head
        model = load(source, config, {**options, **_placement(settings)})
    if "gguf_file" in options:
        forget_quantized(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        logger.warning("model: the adapter in %r is added to its weights, as transformers does", name)
    if not in_files and settings.device != "auto":
        model.to(torch.device(settings.device or best_device()))
    return model.eval(), _load_tokenizer(name, source, options)


def load_config(name: str, settings: ModelSettings | None = None, **fields: Unpack[ModelFields]) -> Any:
    """The config of a model, without its weights; with the dtype of `settings` unless that is "auto".

    Raises:
        ValueError: the model does not exist or cannot be read; gives the reason.
        ImportError: a GGUF file without the gguf package.
    """
    settings = resolve(load_config, ModelSettings, settings, fields)
    source, options = locate(name, settings)
    base = base_of(source)
    if base is not None:
        return load_config(base, settings)
    config = _build_config(name, source, options)
    if settings.dtype != "auto":
        config.dtype = getattr(torch, settings.dtype)
    return config


def locate(name: str, settings: ModelSettings) -> tuple[str, dict[str, Any]]:
    """Source and options for `from_pretrained`.

    Args:
        name: a Hub id, a directory, which may be an output directory, or a path that ends in ".gguf".
        settings: dtype, device, revision and trust_remote_code.

    Raises:
        ValueError: there is no such file or directory, or a revision of a local model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = next(iter(places(path)), path)
    if path.exists():
        check_effect(settings, ["revision"], f"the local model {name!r}")
    source, options = (
        str(path) if path.is_dir() else name,
        {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code},
    )
    check_model_path(name)
    if path.suffix == ".gguf":
        source, options["gguf_file"] = str(path.parent), path.name
        require_gguf("reading a GGUF file")
    return source, options


def embedded_model(placement: str) -> str:
    """Directory of one of the two small models in the package, whose training differs only in the norm placement.

    Args:
        placement: one of `EMBEDDED_PLACEMENTS`.

    Raises:
        ValueError: another placement.
    """
    if placement not in EMBEDDED_PLACEMENTS:
        raise ValueError(f"placement: expected one of {', '.join(EMBEDDED_PLACEMENTS)}, got {placement!r}")
    return str(EMBEDDED / placement)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, or of a directory that holds only a tokenizer. No code of the tokenizer is executed.

    Args:
        name: a Hub id or a directory.

    Raises:
        ValueError: there is no tokenizer, or it cannot be read; gives the reason.
    """
    check_model_config(name, field="tokenizer")
    return _read_tokenizer(name, name, {"trust_remote_code": False})


def best_device() -> str:
    """Device type of the accelerator if there is one, else "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def _build_config(name: str, source: str, options: dict[str, Any]) -> Any:
    if "gguf_file" in options:
        file: str | None = str(Path(source) / options["gguf_file"])
    else:
        file = check_model_config(source, options["revision"])
    with building("a config that transformers can build", file or source), _naming(name, source, options):
        return AutoConfig.from_pretrained(source, **options)


@contextmanager
def _naming(name: str, source: str, options: dict[str, Any]) -> Iterator[None]:
    """Turns errors of reading into a ValueError that names the model."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(name, source, error) from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if "gguf_file" not in options:
            raise
        # The GGUF reader does not check what it reads: a damaged file leads to errors of any type.
        raise _unreadable(name, source, error) from error


def _unreadable(name: str, source: str, error: Exception) -> ValueError:
    told = str(error)
    if told.startswith("max_memory: ") or (told.startswith("model: expected") and f" in {source!r}" in told):
        return ValueError(told)
    if str(error).startswith("model: expected"):
        return ValueError(str(error).replace(", got", f", got in {name!r}", 1))
    if _TRUST in str(error):
        return ValueError(
            f"{_TRUST}: expected True (--trust-remote-code on the command line) for a model with code of its own, got "
            f"False for {name!r}; read the code first, because it then runs on this machine"
        )
    return ValueError(
        f"model: expected a Hub id, a directory with a checkpoint, or a .gguf file, got {name!r}: {one_line(error)}"
    )


def _placement(settings: ModelSettings) -> dict[str, Any]:
    placement: dict[str, Any] = {"dtype": settings.dtype}
    if settings.device == "auto":
        placement["device_map"] = "auto"
    return placement


def _load_with_head(source: str, config: Any, options: dict[str, Any]) -> Any:
    named = (getattr(config, "architectures", None) or ["ForCausalLM"])[0]
    auto = _auto_of(config, named) or next((name for end, name in HEADS.items() if named.endswith(end)), "AutoModel")
    model_class = getattr(transformers, named, getattr(transformers, auto))
    model, info = read(model_class, source, **options)
    head = [key for key in model.state_dict() if in_head(model, key)]
    missing = [key for key in head if key in info["missing_keys"]]
    # More than half of the head: tied matrices are never reported as missing, and a single missing bias is harmless.
    if len(missing) > len(head) / 2:
        logger.warning("the checkpoint has no weights for the head of %s: the model is loaded without head", named)
        return load_exactly(AutoModel, source, **options)
    check_loaded(model, info)
    return model


def _load_in_files(source: str, config: Any, options: dict[str, Any]) -> Any:
    """As `_load_with_head`; the weights stay in files."""
    try:
        with offloading_silenced():
            model = _load_with_head(source, config, {**options, "device_map": IN_FILES})
    except ValueError as error:
        if "offload_folder" in str(error):  # transformers requires one for tensors that it changes
            refuse_in_files(f"a checkpoint with the tensors of the model, got {source!r}, whose tensors are converted")
        raise
    weights_can_change(model)
    return model


def _auto_of(config: Any, named: str) -> str | None:
    """The Auto class that loads a class with code in the checkpoint, by the config's `auto_map`; None if none does."""
    for auto, value in (getattr(config, "auto_map", None) or {}).items():
        names = [str(name).rpartition(".")[2] for name in (value if isinstance(value, list) else [value])]
        if named in names and auto.startswith("AutoModel") and hasattr(transformers, auto):
            return str(auto)
    return None


def _load_tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    try:
        return _read_tokenizer(name, source, options)
    except ValueError as error:
        if not _has_tokenizer(source, options):  # a vision model, or weights alone
            return None
        if _TRUST in str(error):
            raise _unreadable(name, source, error) from error
        raise


def _read_tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        cause = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer: expected tokenizer files that transformers can read, got {type(error).__name__} in {name!r}: "
            f"{cause}"
        ) from error
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise ValueError(f"tokenizer: expected a positive number as model_max_length, got {longest!r} in {name!r}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # GPT-2's class is made without files, too
        raise ValueError(f"tokenizer: expected tokenizer files, got none in {name!r}; save the model's tokenizer there")
    return tokenizer


def _has_tokenizer(source: str, options: dict[str, Any]) -> bool:
    """Whether a directory, Hub repository or GGUF file holds a tokenizer, readable or not."""
    if "gguf_file" in options:
        from gguf import GGUFReader

        return "tokenizer.ggml.tokens" in GGUFReader(Path(source) / options["gguf_file"]).fields
    told = {"revision": options["revision"], "_raise_exceptions_for_missing_entries": False}
    return any(cached_file(source, file, **told) is not None for file in TOKENIZER_FILES)
