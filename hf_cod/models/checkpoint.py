"""Atomic writing of a model directory: it exists completely or not at all.

`hf_cod/io/output_directory.py` does this for commands. This file serves the functions of `convert.py`, because
models/ imports no other folder of this package.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    FEATURE_EXTRACTOR_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
    VIDEO_PROCESSOR_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import (
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    cached_file,
    list_repo_templates,
)

# Of these, and of config.json, the files whose `auto_map` names custom code.
WITH_CODE = (
    TOKENIZER_CONFIG_FILE,
    *dict.fromkeys((FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME)),
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
# Files next to the weights that a conversion copies. Names of vocabularies are those of single tokenizers.
COMPANIONS = (
    *WITH_CODE,
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    ADDED_TOKENS_FILE,
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
# sentence-transformers lists what follows the model (pooling, projections, normalization), a folder each, here.
MODULES = "modules.json"
_WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
_FOLDER = re.compile(r"\w[\w.-]*")


def check_new(output: str | Path | None) -> None:
    """Raise ValueError if `output` exists, or is no path.

    Raises:
        ValueError: "output: expected ..., got ...".
    """
    if not isinstance(output, str | os.PathLike | None):
        raise ValueError(f"output: expected a path or None, got {output!r}")
    if output is not None and os.path.lexists(output):
        raise ValueError(f"output: expected a path that does not exist yet, got {output}")


def is_reading_error(error: Exception) -> bool:
    """Whether an exception means that a file or a repository cannot be read, and not a bug in this package."""
    # Errors of the HTTP library are not wrapped by huggingface_hub; they are recognised without importing it.
    of_network = type(error).__module__.startswith(("httpx", "httpcore"))
    return of_network or isinstance(error, OSError | SafetensorError)


def find_companions(
    source: str | Path, revision: str | None = None, with_code: Iterable[str] = WITH_CODE
) -> dict[str, str]:
    """Name -> path of the files beside the weights in a directory or a Hub repository, including custom code.

    These are the files of the tokenizer, of the processors, of the chat templates, and of what sentence-transformers
    runs after the model.

    Args:
        source: A directory or a Hub id.
        revision: Revision on the Hub.
        with_code: The configs whose custom code is included; with "config.json", the code of the model, too.

    Raises:
        ValueError: If the Hub did not answer; the model would be saved without its tokenizer.
    """
    found = _find(source, [*COMPANIONS, *_templates(source, revision)], revision)
    found |= _find_modules(source, revision)
    configs = _find(source, with_code, revision).values()
    return {**found, **_find_code(source, {module for config in configs for module in _own_code(config)}, revision)}


def copy_companions(source: str | Path, directory: Path, revision: str | None = None) -> None:
    """Copies the files that `find_companions` finds into a directory.

    Raises:
        ValueError: If the Hub did not answer.
    """
    for name, found in find_companions(source, revision).items():
        copy_companion(found, directory / name)


def copy_companion(found: str, target: Path) -> None:
    """Copies one file; makes its directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, target)


def _templates(source: str | Path, revision: str | None) -> list[str]:
    """Names of the chat templates beside the default one."""
    if Path(source).is_dir():
        names = [path.name for path in sorted((Path(source) / CHAT_TEMPLATE_DIR).glob("*.jinja"))]
    else:
        with _answering(source, CHAT_TEMPLATE_DIR):
            names = list_repo_templates(str(source), local_files_only=constants.HF_HUB_OFFLINE, revision=revision)
    # Transformers gives names with the suffix if it asks the Hub, and without it from the cache.
    return [f"{CHAT_TEMPLATE_DIR}/{name.removesuffix('.jinja')}.jinja" for name in names]


def _find_modules(source: str | Path, revision: str | None) -> dict[str, str]:
    """`MODULES`, and the config and the weights in each folder that it names."""
    found = _find(source, [MODULES], revision)
    for path in [*found.values()]:
        try:
            folders = [str(module["path"]) for module in json.loads(Path(path).read_text(encoding="utf-8"))]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"modules: expected a list with a path each in {path!r}, got other contents") from error
        for folder in filter(None, folders):  # the model itself has none
            if not _FOLDER.fullmatch(folder):  # copied files must not be written outside the directory
                raise ValueError(f"modules: expected folders in the same directory, got {folder!r} in {path!r}")
            found |= _find(source, [f"{folder}/{name}" for name in ("config.json", *_WEIGHTS)], revision)
    return found


def _find(source: str | Path, names: Iterable[str], revision: str | None = None) -> dict[str, str]:
    found = {}
    for name in names:
        with _answering(source, name):
            path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:  # None where there is no such file
            found[name] = path
    return found


@contextmanager
def _answering(source: str | Path, name: str) -> Iterator[None]:
    """Turns a failed download into a ValueError."""
    try:
        yield
    except Exception as error:
        if not is_reading_error(error):
            raise
        raise ValueError(
            f"source: expected an answer from the Hub for {name} of {str(source)!r}, got an error: {error}; "
            "nothing was written, and downloaded files are kept; run it again"
        ) from error


def _find_code(source: str | Path, files: Iterable[str], revision: str | None) -> dict[str, str]:
    """Code files, and those that they import from the same directory."""
    found: dict[str, str] = {}
    names = set(files)
    while names:
        new = _find(source, sorted(names), revision)
        found |= new
        imported = {module for path in new.values() for module in get_relative_imports(path)}
        names = {f"{module}.py" for module in imported if module.isidentifier()} - found.keys()
    return found


def _own_code(config: str) -> set[str]:
    """The code files that a config's auto_map names, except in other repositories ("owner/name--module.Class")."""
    try:
        auto_map = json.loads(Path(config).read_text(encoding="utf-8")).get("auto_map", {})
        values = [value if isinstance(value, list) else [value] for value in auto_map.values()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"auto_map: expected class names in {config!r}, got other contents: {error}") from error
    names = [name for value in values for name in value if name is not None]
    modules = {str(name).split(".")[0] for name in names if "--" not in str(name)}
    paths = sorted(name for name in modules if not name.isidentifier())
    if paths:  # copied files must not be written outside the directory
        raise ValueError(f"auto_map: expected modules in the same directory, got {paths[0]!r} in {config!r}")
    return {f"{name}.py" for name in modules}


def save_aside(model: PreTrainedModel, output: Path, companions_from: str | Path | None = None) -> None:
    """Save a model under a temporary name next to `output`, sync it to the disk and rename it.

    Args:
        model: The model to save.
        output: The new directory.
        companions_from: A directory or a Hub id whose tokenizer and processor files are copied.

    Raises:
        ValueError: If `output` exists, or `companions_from` is a Hub id and the Hub did not answer.
    """
    check_new(output)
    companions = {} if companions_from is None else find_companions(companions_from)
    partial = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)  # not by tempfile, whose directories only their owner can read
    try:
        model.save_pretrained(partial)
        for name, found in companions.items():
            copy_companion(found, partial / name)
        mode = (partial / "config.json").stat().st_mode
        for path in filter(Path.is_file, partial.rglob("*")):
            path.chmod(mode)  # safetensors writes files that only their owner can read, whatever the umask is
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
