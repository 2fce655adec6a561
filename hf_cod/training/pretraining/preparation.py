"""Prepares a training loop from settings: tokenizer, model, packed text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import cached_assets_path
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, set_seed

from hf_cod.io.files import directory_aside, fingerprint
from hf_cod.io.models import load_tokenizer
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.packing import PackedStream, PackedText, pack, pack_once, tokenizer_identity, train_tokenizer
from hf_cod.io.rows import load_rows
from hf_cod.io.settings import TextSettings
from hf_cod.io.text import plain_texts
from hf_cod.layers.replicas import first_process_first, is_first, together
from hf_cod.models import CodLlamaForCausalLM
from hf_cod.training.pretraining.recipes import PretrainSettings, Recipe, model_config
from hf_cod.training.runs import run_directory
from hf_cod.training.runs.training_settings import warn_of_passes

HELD_OUT_SHARE = 0.02  # share of the windows, if no validation text is set
PROBE_SAMPLES = 8
TEXT_LIMIT = 600.0  # seconds to wait for another process that reads the tokenized text, or streams
# Settings that may differ when a run is resumed: they affect output, memory and speed, not the trained model.
FREE = ("output", "micro_batch_size", "compile", "save_every", "evaluate_every", "diagnose_every", "log_every")

# Builds a newly initialised model, float32, from the settings of a run and its tokenizer.
Build = Callable[[PretrainSettings, Any], PreTrainedModel]


@dataclass
class Prepared:
    """Tokenizer, model, datasets and directory for a training loop.

    Attributes:
        tokenizer: the tokenizer of model and text.
        model: a newly initialised model, float32.
        train: the run's windows as input_ids and labels: `PackedText`, or `PackedStream` for streamed text.
        validation: held-out windows.
        output: the run's directory, locked, on the main process; None on others.
    """

    tokenizer: Any
    model: PreTrainedModel
    train: Dataset
    validation: Dataset
    output: OutputDirectory | None = None

    @property
    def probe(self) -> list[dict[str, Tensor]]:
        """The first validation windows, for diagnostics of the layers during training."""
        return as_batches(Subset(self.validation, range(min(PROBE_SAMPLES, len(self.validation)))), PROBE_SAMPLES)  # type: ignore[arg-type]

    @property
    def streams(self) -> bool:
        """Whether the text is tokenized while training."""
        return isinstance(self.train, PackedStream)


def prepare(settings: PretrainSettings, build: Build | None = None) -> Prepared:
    """Loads or trains the tokenizer, tokenizes and packs the text (cached), and builds the model.

    Must be called on every process; the first process fills the cache. A tokenizer that is trained here is trained on
    the full text, including held-out windows.

    Args:
        settings: settings of the run.
        build: builds the model from the settings and the tokenizer; default: a Llama, by `build_model`.

    Raises:
        ValueError: no such text, column or tokenizer, too little text, an output directory of another run, or processes
            that differ in settings or text.
    """
    recipe = settings.recipe
    PartialState()  # joins the processes of a launcher
    texts = _text_settings(settings, recipe)
    with together("prepare a run") as alike:
        alike |= settings.describe()
    with ExitStack() as stack, together("prepare the text", TEXT_LIMIT) as alike, first_process_first(TEXT_LIMIT):
        output = stack.enter_context(_directory(settings)) if is_first() else None
        claim(settings)
        tokenizer = _tokenizer(recipe, texts)
        if recipe.stream:
            bookmarks = Path(str(settings.output)) / "bookmarks.jsonl"
            rows = load_rows(texts)
            train: Dataset = PackedStream(rows, texts.text_column, tokenizer, recipe.sequence_length, bookmarks)
            held_out = None
        else:
            name = fingerprint(_source(texts), recipe.sequence_length, tokenizer_identity(tokenizer))
            windows = pack_once(_cache(f"{name}.safetensors"), tokenizer, plain_texts(texts), recipe.sequence_length)
            held_out = None if settings.validation_text else _held_out(len(windows), settings.validation_samples)
            kept = windows if held_out is None else windows[: len(windows) - held_out]
            train = PackedText(kept, recipe.steps * recipe.batch_size, settings.seed)
            if is_first():
                warn_of_passes(recipe.steps, recipe.steps * recipe.batch_size / len(kept), len(kept))
            alike["text"] = len(windows)
        validation = windows[len(windows) - held_out :] if held_out else _validation(settings, recipe, texts, tokenizer)
        alike |= {"tokenizer": tokenizer_identity(tokenizer), "validation_text": len(validation)}
        stack.pop_all()  # the directory stays locked until the results are saved
    model = (build or _llama)(settings, tokenizer)
    return Prepared(tokenizer, model, train, PackedText(validation, len(validation), seed=0), output)


def _llama(settings: PretrainSettings, tokenizer: Any) -> CodLlamaForCausalLM:
    return build_model(settings.recipe, settings.norm_placement, settings.seed, tokenizer)


def build_model(recipe: Recipe, norm_placement: str, seed: int, tokenizer: Any) -> CodLlamaForCausalLM:
    """A newly initialised model; with the same seed, all placements have the same weights before their own scaling.

    Raises:
        ValueError: the tokenizer has ids above the size of the model's embedding.
    """
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = model_config(recipe, norm_placement, use_cache=False, pad_token_id=tokenizer.pad_token_id, **special)
    # T5's last hundred ids are sentinel tokens; plain text has none, and the papers' models have no embedding for them.
    highest = max(
        (i for token, i in tokenizer.get_vocab().items() if not re.match(r"<extra_id_\d+>", token)), default=0
    )
    if highest >= config.vocab_size:
        raise ValueError(
            f"tokenizer: expected ids below the model's vocabulary of {config.vocab_size}, got {highest}; "
            "choose another tokenizer, or a preset with a larger vocabulary"
        )
    set_seed(seed)
    return CodLlamaForCausalLM(config)


def _text_settings(settings: PretrainSettings, recipe: Recipe) -> TextSettings:
    return TextSettings(
        text=recipe.text,
        text_column=settings.text_column,
        text_split=settings.text_split,
        text_config=recipe.text_config,
    )


def _source(texts: TextSettings) -> list[Any]:
    """The identity of a text: its settings; for local files also sizes and modification times."""
    path = Path(texts.text or "")
    local: list[Any] = []
    if texts.text and path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        local = [path.resolve().as_posix(), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    return [texts.text, texts.text_column, texts.text_split, texts.text_config, *local]


def _cache(name: str) -> Path:
    return Path(cached_assets_path(library_name="hf_cod", namespace="pretraining", subfolder="text")) / name


def _tokenizer(recipe: Recipe, texts: TextSettings) -> Any:
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)
    vocabulary = model_config(recipe, "pre").vocab_size
    folder = _cache(f"tokenizer-{fingerprint(_source(texts), vocabulary)}")
    if not folder.is_dir():
        trained = train_tokenizer(plain_texts(texts), vocabulary)
        try:
            with directory_aside(folder) as aside:
                trained.save_pretrained(aside)
        except OSError:  # another run has just created the same folder
            if not folder.is_dir():
                raise
    return load_tokenizer(str(folder))


def _held_out(windows: int, most: int) -> int:
    if windows < 2:
        raise ValueError(
            f"text: expected at least two windows, one of them for validation, got {windows}; use a longer text"
        )
    return min(most, max(1, round(HELD_OUT_SHARE * windows)))


def _validation(settings: PretrainSettings, recipe: Recipe, texts: TextSettings, tokenizer: Any) -> Tensor:
    source: Iterable[str]
    if settings.validation_text is not None:
        source = plain_texts(replace(texts, text=settings.validation_text, text_config=None))
    elif recipe.validation_split is not None:
        source = plain_texts(replace(texts, text_split=recipe.validation_split))
    else:
        raise ValueError("validation_text: expected a validation text with streamed text, got none")
    return pack(tokenizer, source, recipe.sequence_length, most=settings.validation_samples)


def as_batches(dataset: Dataset, batch_size: int) -> list[dict[str, Tensor]]:
    """A dataset's windows as batches of input_ids (S, T), for `perplexity` and `diagnose`."""
    ids = torch.stack([dataset[i]["input_ids"] for i in range(len(dataset))])  # type: ignore[arg-type]
    return [{"input_ids": part} for part in ids.split(batch_size)]


def claim(settings: PretrainSettings) -> None:
    """Marks the output directory as this run's, so that no other run resumes from its checkpoints or uses its report.

    Raises:
        ValueError: the directory holds a model, or checkpoints or the report of a run with other settings or with a
            text of another size.
    """
    run_directory.claim(Path(str(settings.output)), _identity(settings), finished=True)


def _directory(settings: PretrainSettings) -> OutputDirectory:
    wanted = _identity(settings)
    return OutputDirectory(
        str(settings.output),
        check=lambda path: run_directory.check_claim(path, wanted, finished=True),
        half=run_directory.half_checkpoints,
        lost=run_directory.lost_checkpoints,
    )


def _identity(settings: PretrainSettings) -> dict[str, Any]:
    """The identity of a run: its settings, and the size of its text."""
    told = {name: value for name, value in settings.describe().items() if name not in FREE}
    return {**told, "text_size": text_size(settings.recipe.text)}


def text_size(text: str | None) -> list[Any]:
    """Bytes of a local text; for a directory, names and bytes of its files. Empty for a dataset of the Hub."""
    path = Path(text or "")
    if text and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [[file.relative_to(path).as_posix(), file.stat().st_size] for file in files]
    return [path.stat().st_size] if text and path.is_file() else []
