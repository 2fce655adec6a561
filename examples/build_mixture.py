"""Trains a small mixture of experts on the text of the embedded pair, with the pair's tokenizer, and measures it.

    python examples/pretraining_text.py --output corpus
    python examples/build_mixture.py --text corpus/train.jsonl --validation-text corpus/validation.jsonl

The result is a stock Qwen3-MoE of 3.6 million parameters with 8 experts in each layer, 2 for each token. Pieces of the
embedded held-out text are excluded from training, so that mixture and pair can be compared on it. Training takes 50
minutes on one CPU core, and the same command resumes it; with the run finished the script takes two minutes. The model
is written to tests/assets/mixture, its card to model_cards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain import pretrain
from shipped_models import ROOT, ship
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, set_seed
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hf_cod import perplexity, score_experts
from hf_cod.cli.parser import SettingsParser
from hf_cod.io.arguments import checked
from hf_cod.io.files import write_text
from hf_cod.io.models import EMBEDDED, ModelSettings, embedded_model, load_model
from hf_cod.io.packing import pack
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.settings import check_least
from hf_cod.io.text import TextSettings, load_texts
from hf_cod.layers.size import count_parameters
from hf_cod.reporting.model_card import CardSettings, release
from hf_cod.training.pretraining.preparation import claim
from hf_cod.training.pretraining.recipes import PretrainSettings
from hf_cod.training.pretraining.results import unigram_perplexity

NAME = "hf-cod-tiny-mixture"
MIXTURE = ROOT / "tests" / "assets" / "mixture"
WHERE = """The weights are in `tests/assets/mixture` of the repository of hf_cod, a directory that can be uploaded to
the Hub.
"""
HEAD_WIDTH = 64  # channels of an attention head, as in the pair
HELD_OUT = EMBEDDED / "held_out.txt"


@checked
@dataclass
class MixtureSettings(PretrainSettings):
    """A run of pre-training of a mixture of experts."""

    layers: int = field(default=7, metadata={"help": "number of layers, each with experts"})
    hidden_size: int = field(default=128, metadata={"help": f"width of the hidden state, a multiple of {HEAD_WIDTH}"})
    experts: int = field(default=8, metadata={"help": "number of experts of each layer"})
    experts_per_token: int = field(default=2, metadata={"help": "number of experts that each token is routed to"})
    expert_width: int = field(default=128, metadata={"help": "intermediate size of an expert"})
    balance: float = field(
        default=0.01,
        metadata={"help": "weight of the load-balancing loss of each layer (arXiv 2101.03961, eq. 4); 0: none"},
    )
    steps: int | None = field(default=2500, metadata={"help": "optimizer steps"})
    norm_placement: str = field(default="pre", metadata={"help": "norm placement of Qwen3-MoE", "choices": ["pre"]})
    precision: str = field(
        default="float32",
        metadata={
            "help": "bf16 (autocast over float32 weights) or float32, which is faster here on a CPU",
            "choices": ["bf16", "float32"],
        },
    )
    tokenizer: str | None = field(
        default_factory=lambda: embedded_model("pre"), metadata={"help": "Hub id or directory; default: the pair's"}
    )
    output: str | None = field(
        default="hf-cod-mixture", metadata={"help": "directory for checkpoints, model and report"}
    )
    save_every: int = field(
        default=100, metadata={"help": "steps between checkpoints; an interrupted run resumes from the last one"}
    )
    evaluate_every: int = field(default=500, metadata={"help": "steps between validations"})
    diagnose_every: int = field(default=250, metadata={"help": "steps between measurements of the layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None or not self.text.endswith(".jsonl"):
            raise ValueError(f"text: expected train.jsonl of pretraining_text.py, got {self.text!r}")
        check_least(self, layers=1, hidden_size=HEAD_WIDTH, experts=1, experts_per_token=1, expert_width=1)
        if self.hidden_size % HEAD_WIDTH:
            raise ValueError(f"hidden_size: expected a multiple of {HEAD_WIDTH}, got {self.hidden_size}")
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token: expected at most {self.experts}, got {self.experts_per_token}")
        if self.balance < 0:
            raise ValueError(f"balance: expected a weight of at least 0, got {self.balance}")


def mixture(settings: PretrainSettings, tokenizer: Any) -> Qwen3MoeForCausalLM:
    """A newly initialised mixture."""
    assert isinstance(settings, MixtureSettings)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // HEAD_WIDTH,
        num_key_value_heads=1,
        head_dim=HEAD_WIDTH,
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        moe_intermediate_size=settings.expert_width,
        intermediate_size=settings.experts_per_token
        * settings.expert_width,  # of layers without experts: there is none
        norm_topk_prob=True,
        router_aux_loss_coef=settings.balance,
        output_router_logits=settings.balance > 0,  # the loss is computed from them
        tie_word_embeddings=True,  # so that the experts, not the embeddings, hold most of the parameters
        max_position_embeddings=settings.recipe.sequence_length,
        use_cache=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # as the pair: at 256 tokens faster than PyTorch's fused attention
    )
    set_seed(settings.seed)
    model = Qwen3MoeForCausalLM(config)
    model.router_aux_loss_coef = 0.0  # the loss of `BalancedTrainer` takes the place of the model's own
    return model


class BalancedTrainer(Trainer):
    """Adds the load-balancing loss of each layer.

    The model's own is that of all layers together: experts that one layer neglects count as used if another layer uses
    those of the same number. With it alone, single experts of this mixture processed 99 % of the tokens after 400
    steps, and others none.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the next token; in training, also of the balance."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and outputs.router_logits is not None:
            config = self.accelerator.unwrap_model(model).config
            sizes = config.num_experts, config.num_experts_per_tok
            balance = sum(load_balancing_loss_func((logits,), *sizes) for logits in outputs.router_logits)
            loss = loss + config.router_aux_loss_coef * balance / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def without_held_out(text: str) -> str:
    """Writes a text of pretraining_text.py without the pieces of the embedded held-out text next to it.

    The corpus is cut anew whenever one of its packages changes, and its other pieces are then the held-out ones.
    """
    held_out, source = HELD_OUT.read_text(encoding="utf-8"), Path(text)
    lines = source.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["text"] not in held_out]
    print(f"{len(lines) - len(kept)} of {len(lines)} pieces are of the held-out text and are excluded")
    target = source.with_name(f"mixture_{source.name}")
    written = "".join(f"{line}\n" for line in kept)
    if not target.is_file() or target.read_text(encoding="utf-8") != written:  # a new time means another text to a run
        write_text(target, written)
    return str(target)


def measure(made: Path, settings: MixtureSettings) -> dict[str, Any]:
    """Perplexities on the embedded held-out text, and the use of the experts; in float32."""
    (model, tokenizer), (dense, _) = (
        load_model(str(name), ModelSettings(dtype="float32")) for name in (made, embedded_model("pre"))
    )
    length = settings.recipe.sequence_length
    windows = pack(tokenizer, [HELD_OUT.read_text(encoding="utf-8")], length).long()
    train = pack(tokenizer, load_texts(TextSettings(text=settings.text)), length)
    batches = [{"input_ids": part} for part in windows.split(settings.recipe.micro_batch_size)]
    usage = score_experts(model, method="frequency", batches=batches)
    experts = sum(map(sum, usage.parameters.values()))
    idle = experts * (settings.experts - settings.experts_per_token) // settings.experts
    return {
        "held_out_tokens": windows.numel(),
        "held_out_perplexity": {
            "mixture": perplexity(model, batches),
            "pre": perplexity(dense, batches),
            "unigram": unigram_perplexity(train, windows, len(tokenizer)),
        },
        "expert_parameters": experts,
        "active_parameters": count_parameters(model) - idle,
        "expert_usage": usage.values,
    }


def describe(found: dict[str, Any], parameters: int, settings: MixtureSettings) -> list[str]:
    """The measurements as sentences for the card."""
    values = {name: format_number(value) for name, value in found["held_out_perplexity"].items()}
    most, least = ([pick(shares) for shares in found["expert_usage"].values()] for pick in (max, min))
    return [
        f"Each of {settings.experts} experts in a layer is a gated MLP of width {settings.expert_width}; each token is "
        f"routed to {settings.experts_per_token}. Experts hold {found['expert_parameters'] / parameters:.0%} of the "
        f"parameters; a token uses {found['active_parameters'] / 1e6:.2g} million of them.",
        f"The training loss includes {settings.balance:g} times the load-balancing loss of each layer.",
        f"Perplexity on {found['held_out_tokens']:,} tokens of the held-out text of the embedded pair: "
        f"{values['mixture']}; the pair's dense model pre, after 10.2 million tokens: {values['pre']}; a unigram "
        f"model: {values['unigram']}. None of them was trained on this text.",
        f"There, the most used expert of a layer processes {min(most):.0%} to {max(most):.0%} of the tokens, the least "
        f"used one {min(least):.0%} to {max(least):.0%} ({settings.experts_per_token / settings.experts:.0%} each if "
        "all are used equally).",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or resumes; then measures, and writes model and card."""
    parser = SettingsParser([MixtureSettings], description=__doc__.split("\n\n")[0])
    parser.add_argument("--license", default="cc-by-sa-4.0", help="licence of the weights")
    settings, chosen = parser.parse(sys.argv[1:] if arguments is None else arguments)
    sources = Path(settings.text).with_name("sources.json")
    settings = replace(settings, text=without_held_out(settings.text))
    claim(settings)
    run = Path(settings.output)
    if not (run / "report.json").is_file():
        pretrain(settings, mixture, BalancedTrainer)
    report = RunReport.load(run)
    if "held_out_perplexity" not in report.results:
        found = measure(run, settings)
        told = describe(found, report.results["parameters"]["trained"], settings)
        replace(report, results=report.results | found, summary=[*told, *report.summary]).save(run)
    card = CardSettings(NAME, chosen.license, sources=str(sources), language="en", where=WHERE)
    made = release(run, run / "release" / NAME, card).parent
    ship(made, MIXTURE)
    print("\n".join(RunReport.load(run).summary))


if __name__ == "__main__":
    main()
