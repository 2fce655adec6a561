"""Writing a whole model directory so that it is there completely or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

# What stands beside the weights and goes with them through a conversion.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
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


def save_aside(model: PreTrainedModel, output: Path, companions_from: str | Path | None = None) -> None:
    """Save a model under a temporary name beside `output`, bring it to the disk and give it its name.

    Args:
        model: The model to save.
        output: The new directory.
        companions_from: A directory or a Hub id whose tokenizer and processor files are copied.

    Raises:
        ValueError: If `output` exists.
    """
    check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(partial)
        if companions_from is not None:
            for name in COMPANIONS:
                # In a directory or in a repository of the Hub; None where it has no such file.
                found = cached_file(companions_from, name, _raise_exceptions_for_missing_entries=False)
                if found is not None:
                    shutil.copyfile(found, partial / name)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp makes directories that nobody else can read
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise
