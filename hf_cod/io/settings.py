"""Conventions for settings of functions, and the settings of models, text and samples.

Rules for every public function with options:

- Its settings are one dataclass in the `settings.py` of its folder, which imports neither torch nor transformers, so
  that `--help` stays fast. The help text of a field is written once, in its metadata; values are checked in
  `__post_init__`.
- The function accepts the dataclass as `settings`, its fields as keywords, or both; keywords override the object. The
  main choice of a function (such as `method`) is also accepted as a positional argument.
- A function that runs a model takes `batches`, or `tokenizer` and `texts`; how texts are cut into samples is passed as
  `samples` (`SampleSettings`), as its fields, or both. `layers/batches.py` makes the batches. Tests walk all functions.
- Inputs, budgets and outputs (model, plan, batches, parameter_share, journal, layers_path, name, show_progress, ...)
  are separate arguments.
- Two functions use another name than `settings`: `quantize` takes `config`, as in transformers, and `apply_steps`
  takes `how`, whose dataclass holds the inputs of its steps. `collect_statistics` and `perplexity` have no settings but
  `samples`. `owlore` passes all arguments to `OwLoreAdamW`.

`tests/test_public_api.py` has the table of functions with their dataclasses, and checks it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypedDict, TypeVar

from hf_cod.io.arguments import checked, unknown_name

Settings = TypeVar("Settings")

# Name of a dtype -> its meaning.
DTYPES = {"auto": "as the weights were saved", "float32": "32 bits", "bfloat16": "16 bits", "float16": "16 bits"}


def resolve(
    function: Callable[..., Any],
    kind: type[Settings],
    settings: Settings | None,
    given: Mapping[str, Any],
    /,
    **chosen: Any,
) -> Settings:
    """Merges a settings object (or the defaults) with fields that were passed as keywords.

    Args:
        function: the function that takes the settings, for messages.
        kind: the dataclass.
        settings: an instance of `kind`, which is not modified, or None.
        given: fields by name, from `**fields`; other arguments of the function, such as fields of its samples, are left
            to it.
        **chosen: fields that are separate arguments of the function; None if not passed.

    Raises:
        ValueError: an unknown field (lists the known ones), an object of another class, or a value that the dataclass
            refuses.
    """
    known = [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    own = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = next((name for name in given if name not in (*known, *own)), None)
    if unknown is not None:
        names = [*known, *(name for name in own if name not in known)]
        raise ValueError(unknown_name(function.__name__, unknown, names))
    values = {name: value for name, value in chosen.items() if value is not None}
    values |= {name: value for name, value in given.items() if name in known}
    if settings is None:
        return kind(**values)
    if not isinstance(settings, kind):
        raise ValueError(f"settings: expected {kind.__name__} for {function.__name__}, got {type(settings).__name__}")
    return replace(settings, **values) if values else copy.copy(settings)  # type: ignore[type-var]


def as_in(settings: type, name: str, **other: Any) -> Any:
    """A field with the help and choices of the same field in `settings`, and its default unless one is passed."""
    (found,) = (f for f in fields(settings) if f.name == name)
    if not other:
        other = {"default": found.default, "default_factory": found.default_factory}
    return field(**other, metadata=found.metadata)


class Default(int):
    """A default that is lowered for small models, with a note; the same number is refused if a user sets it."""


class DefaultNumber(float):
    """A default value, distinguishable from the same number set by a user, which is refused where it has no effect."""


class DefaultName(str):
    """The same, for a name."""

    __slots__ = ()


def given(settings: Any, names: Iterable[str]) -> list[str]:
    """Those of the settings that a user set: not the default, nor a number or name equal to a marked default."""
    marks = (Default, DefaultName, DefaultNumber)
    found = []
    for name in names:
        known, value = type(settings).__dataclass_fields__[name], getattr(settings, name)
        default = known.default if known.default_factory is MISSING else known.default_factory()
        if not isinstance(value, marks) and (isinstance(default, marks) or value != default):
            found.append(name)
    return found


def check_effect(settings: Any, names: Iterable[str], beside: str) -> None:
    """Checks that settings without an effect are not set.

    Args:
        settings: an instance of a settings dataclass.
        names: its fields that have no effect.
        beside: what makes them ineffective, for the error.

    Raises:
        ValueError: one of them is set.
    """
    for name in given(settings, names):
        raise ValueError(f"{name}: expected none with {beside}, got {getattr(settings, name)!r}")


def following(text: str) -> Any:
    """A field that `__post_init__` sets from other settings if the user does not set it.

    Args:
        text: the help text, which names the other settings.
    """
    return field(default=None, metadata={"help": text})


def layers_path_field() -> Any:
    """The field `layers_path`, for functions that look up the layers of a model."""
    return field(
        default=None,
        metadata={
            "help": "which stack of layers to use, for a model with several: encoder, decoder, text, vision, ..., or "
            "the name of a module list; default: the only stack, the decoder, or the text tower",
            "also": "stack",
        },
    )


def check_choice(name: str, value: Any, table: Collection[str]) -> None:
    """Raises ValueError if a value is not one of the allowed names; gives the closest one."""
    if value not in table:
        raise ValueError(unknown_name(name, value, table))


def check_least(settings: Any, **bounds: float) -> None:
    """Checks fields as `check_number`; `bounds` holds the least value of each."""
    for name, least in bounds.items():
        check_number(name, getattr(settings, name), least)


def check_number(name: str, value: float | None, least: float) -> None:
    """Checks the lower bound of a number; None is allowed.

    Raises:
        ValueError: the number is below its bound, or not finite.
    """
    if value is not None and not least <= value < math.inf:
        word = "at least" if math.isfinite(value) else "a finite number of at least"
        raise ValueError(f"{name}: expected {word} {least}, got {value}")


def check_seed(seed: int, least: int = -(2**63), most: int = 2**64 - 1) -> None:
    """Checks the range of a seed; the default range is that of torch's generators.

    Raises:
        ValueError: the seed is out of range.
    """
    if not least <= seed <= most:
        raise ValueError(f"seed: expected a whole number from {least} to {most}, got {seed}")


# Of plots: one raster format and two vector formats.
PLOT_FORMATS = ("png", "pdf", "svg")


@checked
@dataclass
class ModelSettings:
    """Settings of model loading."""

    dtype: str = field(
        default="auto", metadata={"help": "dtype of the weights; auto: as saved", "choices": tuple(DTYPES)}
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "cpu, cuda, cuda:1, mps, or auto to distribute the model over all devices; default: the "
            "accelerator that torch finds, else cpu"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run the custom code in the model's repository"})
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
    import torch  # only here, so that --help does not import it

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown device name, or device not available
        raise ValueError(f"device: expected cpu, cuda, mps or auto as this machine has them, got {device!r}") from error


@checked
@dataclass
class TextSettings:
    """Settings of the text source."""

    text: str | None = field(
        default=None,
        metadata={
            "help": "text file (.txt), file of texts or chats (.jsonl, .json, .csv, .parquet), or dataset name; "
            "default: a novel that is part of this package"
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "column of the dataset that holds the text, or the messages"}
    )
    text_split: str = field(default="train", metadata={"help": "split of the dataset"})
    text_config: str | None = field(
        default=None, metadata={"help": "configuration of the dataset; default: the default of the dataset"}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file with the chat template of chats; default: the tokenizer's"}
    )

    def check_source(self) -> None:
        """Checks that column, split, configuration and template are set only together with `text`.

        Raises:
            ValueError: one of them is set without `text`.
        """
        for name in ("text_column", "text_split", "text_config", "chat_template"):
            if self.text is None and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}: expected also text, the file or dataset that it applies to, got none")


class TextFields(TypedDict, total=False):
    """Fields of `TextSettings` that `load_texts` takes by name."""

    text: str | None
    text_column: str
    text_split: str
    text_config: str | None
    chat_template: str | None


@checked
@dataclass
class SampleSettings:
    """Settings of sampling: how text is cut into token batches."""

    sequence_length: int = field(default=256, metadata={"help": "tokens per sample, including special tokens"})
    max_samples: int = field(
        default=32, metadata={"help": "maximum number of samples, chosen at random by seed if the text has more"}
    )
    batch_size: int = field(default=4, metadata={"help": "samples per forward pass"})
    pack: bool = field(
        default=True,
        metadata={
            "help": "join the texts and cut them into samples of --sequence-length; --no-pack: one padded sample per "
            "text"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of all random choices"})

    def __post_init__(self) -> None:
        check_least(self, sequence_length=2, max_samples=1, batch_size=1)
        check_seed(self.seed)


class SampleFields(TypedDict, total=False):
    """Fields of `SampleSettings` that `token_batches` takes by name."""

    sequence_length: int
    max_samples: int
    batch_size: int
    pack: bool
    seed: int
