"""Writing a whole model directory so that it is there completely or not at all.

`hf_cod/io/output_directory.py` does that for commands. What is here serves the functions of `convert.py`, because
models/ imports nothing of ours outside itself.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

# What stands beside the weights and goes with them through a conversion.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def check_new(output: str | Path | None) -> None:
    """Raise ValueError if there is something at `output` already.

    Raises:
        ValueError: "output: expected ..., got ...".
    """
    if output is not None and os.path.lexists(output):
        raise ValueError(f"output: expected a path that does not exist yet, got {output}")


def is_reading_error(error: Exception) -> bool:
    """Whether an exception tells of a file or a repository that cannot be read, and not of a mistake in our code."""
    # Errors of the network's library reach us as they are, and we do not import that.
    of_network = type(error).__module__.startswith(("httpx", "httpcore"))
    return of_network or isinstance(error, OSError | SafetensorError)


def find_companions(source: str | Path) -> dict[str, str]:
    """Name -> path of the tokenizer and processor files of a directory or a repository of the Hub, own code included.

    Raises:
        ValueError: If the Hub did not answer: without its tokenizer a model would look complete and not be.
    """
    found = _find(source, COMPANIONS)
    configs = [found[name] for name in ("tokenizer_config.json", "processor_config.json") if name in found]
    return {**found, **_find(source, sorted({module for config in configs for module in _own_code(config)}))}


def copy_companions(source: str | Path, directory: Path) -> None:
    """Copies the files that `find_companions` finds into a directory.

    Raises:
        ValueError: If the Hub did not answer.
    """
    for name, found in find_companions(source).items():
        shutil.copyfile(found, directory / name)


def _find(source: str | Path, names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except Exception as error:
            if not is_reading_error(error):
                raise
            raise ValueError(
                f"source: expected {name} of {str(source)!r}, or to hear that there is none, got no answer: {error}; "
                "nothing was written; what is downloaded is kept, so run it again"
            ) from error
        if path is not None:  # None where there is no such file
            found[name] = path
    return found


def _own_code(config: str) -> set[str]:
    """The files whose classes a config's auto_map names; of "owner/name--module.Class" the code stays where it is."""
    try:
        auto_map = json.loads(Path(config).read_text(encoding="utf-8")).get("auto_map", {})
        values = [value if isinstance(value, list) else [value] for value in auto_map.values()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"auto_map: expected classes by name, got {config!r}: {error}") from error
    names = [name for value in values for name in value if name is not None]
    modules = {str(name).split(".")[0] for name in names if "--" not in str(name)}
    paths = sorted(name for name in modules if not name.isidentifier())
    if paths:  # what is copied by this name must not leave the directory
        raise ValueError(f"auto_map: expected modules beside the file, got {paths[0]!r} in {config!r}")
    return {f"{name}.py" for name in modules}


def save_aside(model: PreTrainedModel, output: Path, companions_from: str | Path | None = None) -> None:
    """Save a model under a temporary name beside `output`, bring it to the disk and give it its name.

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
    partial.mkdir(parents=True)  # not by tempfile, whose directories their owner alone may enter
    try:
        model.save_pretrained(partial)
        for name, found in companions.items():
            shutil.copyfile(found, partial / name)
        mode = (partial / "config.json").stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask is
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
