"""How functions take their settings, and the settings of what comes in.

The rule, the same for every public function that has options:

- Its settings are one dataclass in the `settings.py` of its folder, which imports neither torch nor transformers, so
  that the command line's help does not wait for them. A field's help text stands there once, in its metadata, and
  what a field may be is checked in `__post_init__`.
- The function takes that dataclass as `settings`, or its fields as keywords, or both: then the keywords replace what
  the object says. A field that is the function's main choice (`method`, say) may be given by position, too.
- What it works on, the budget that it meets and what it reports to (model, plan, batches, parameter_share, journal,
  layers_path, name, show_progress, ...) are arguments of their own.
- Two have another name for `settings`: `quantize` takes transformers' `config`, and `apply_steps`, whose dataclass
  holds what its steps work on, takes `how`. `owlore` hands all on to `OwLoreAdamW`.

`tests/test_public_api.py` has the table of functions with their dataclasses, and checks it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict, TypeVar

from hf_cod.io.arguments import checked, unknown_name

Settings = TypeVar("Settings")

# Name of a dtype -> what it means.
DTYPES = {"auto": "as the weights were saved", "float32": "32 bits", "bfloat16": "16 bits", "float16": "16 bits"}


def resolve(
    function: Callable[..., Any],
    kind: type[Settings],
    settings: Settings | None,
    given: Mapping[str, Any],
    /,
    **chosen: Any,
) -> Settings:
    """The settings that a caller means: those of the object, or defaults, with the fields that were given by name.

    Args:
        function: whose settings they are, for messages.
        kind: the dataclass.
        settings: an object of it, which stays as it is, or None.
        given: fields by name, from `**fields`.
        **chosen: fields that the function takes as arguments of their own, None where they were not given.

    Raises:
        ValueError: an unknown field (says which there are), an object of another class, or what the dataclass refuses.
    """
    known = [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        own = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
        names = [*known, *(name for name in own if name not in known)]
        raise ValueError(unknown_name(function.__name__, unknown, names))
    values = {**{name: value for name, value in chosen.items() if value is not None}, **given}
    if settings is None:
        return kind(**values)
    if not isinstance(settings, kind):
        raise ValueError(f"settings: expected {kind.__name__} for {function.__name__}, got {type(settings).__name__}")
    return replace(settings, **values) if values else copy.copy(settings)  # type: ignore[type-var]


def as_in(settings: type, name: str, **other: Any) -> Any:
    """A field with the help and the choices that it has in other settings, and its default there if no `default` is
    given here.
    """
    (found,) = (f for f in fields(settings) if f.name == name)
    if not other:
        other = {"default": found.default, "default_factory": found.default_factory}
    return field(**other, metadata=found.metadata)


class Default(int):
    """A default that a small model lowers, with a note; the same number, when a user gives it, is refused there."""


def following(text: str) -> Any:
    """A field that `__post_init__` fills, from other settings, where the user gave none.

    Args:
        text: its help, which says from which.
    """
    return field(default=None, metadata={"help": text})


def layers_path_field() -> Any:
    """The field of settings whose function finds the layers of a model that it is given."""
    return field(
        default=None, metadata={"help": "name of the module list of layers, for models where it cannot be found"}
    )


def check_choice(name: str, value: Any, table: Collection[str]) -> None:
    """Makes sure that a value is one of a table's names.

    Raises:
        ValueError: it is another one.
    """
    if value not in table:
        raise ValueError(f"{name}: expected one of {', '.join(table)}, got {value!r}")


# File formats of pictures: dots, and two that print sharply at any size.
PLOT_FORMATS = ("png", "pdf", "svg")


@checked
@dataclass
class ModelSettings:
    """How a model is loaded."""

    dtype: str = field(
        default="auto", metadata={"help": "dtype of the weights; auto: as they were saved", "choices": tuple(DTYPES)}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cpu, cuda, cuda:1, mps, or auto to spread over all devices; default: the best single one"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code that the model's repository carries"}
    )
    revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.device not in (None, "auto"):
            _check_device(str(self.device))


class ModelFields(TypedDict, total=False):
    """Fields of `ModelSettings` that `load_model` takes by name."""

    dtype: str
    device: str | None
    trust_remote_code: bool
    revision: str


def _check_device(device: str) -> None:
    import torch  # a device that was named is about to be used

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say: no such name, no such device here
        raise ValueError(f"device: expected cpu, cuda, mps or auto as this machine has them, got {device!r}") from error


@checked
@dataclass
class TextSettings:
    """Which text a model is measured on, and how it is cut into samples."""

    text: str | None = field(
        default=None,
        metadata={"help": "text file (.txt, .jsonl, .csv, .parquet) or data set name; default: an embedded novel"},
    )
    text_column: str = field(default="text", metadata={"help": "column of the data set that holds the text"})
    text_split: str = field(default="train", metadata={"help": "split of the data set"})
    text_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})

    def check_source(self) -> None:
        """Makes sure that what says how a data set is read has one to read.

        Raises:
            ValueError: it has none.
        """
        for name in ("text_column", "text_split", "text_config"):
            if self.text is None and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}: expected a text beside it, got none")


class TextFields(TypedDict, total=False):
    """Fields of `TextSettings` that `load_texts` takes by name."""

    text: str | None
    text_column: str
    text_split: str
    text_config: str | None


@checked
@dataclass
class SampleSettings:
    """How text becomes samples."""

    sequence_length: int = field(default=256, metadata={"help": "tokens in a sample, special tokens included"})
    max_samples: int = field(default=32, metadata={"help": "samples to measure on; more text is drawn from by seed"})
    batch_size: int = field(default=4, metadata={"help": "samples in one forward pass"})
    pack: bool = field(
        default=True,
        metadata={"help": "join the texts and cut windows of equal length, instead of one padded sample a text"},
    )
    seed: int = field(default=0, metadata={"help": "seed of every random choice"})

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("max_samples", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


class SampleFields(TypedDict, total=False):
    """Fields of `SampleSettings` that `token_batches` takes by name."""

    sequence_length: int
    max_samples: int
    batch_size: int
    pack: bool
    seed: int
