"""What the tables of examples/ try, and what they take for known."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from hf_cod.io.models import embedded_model, load_model

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [name for name, m in sys.modules.items() if getattr(m, "__file__", None) and str(FOLDER) in m.__file__]:
        del sys.modules[name]


def test_what_is_healed_otherwise_is_another_entry(load):
    tables, tokenizer = load("table_healing"), load_model(embedded_model("lns"))[1]

    def key(*options):
        parser = argparse.ArgumentParser()
        tables.add_healing(parser)
        parser.set_defaults(text=None, report_text=None, sequence_length=64)
        return tables.Healing(None, tokenizer, parser.parse_args(options)).key("cell")

    options = [], ["--heal", "1k"], *(["--heal", "1k", *more] for more in (["--heal-batch", "8"], ["--heal-bf16"]))
    assert len({key(*given) for given in options}) == 4 and key() == "cell healed"


def test_methods_are_tried_by_ranks_that_they_take(load):
    table = load("rank_table")
    bench = object.__new__(table.Bench)
    tried = {method: {score for score, *_ in bench.tried(method, "auto", 0.8)} for method in table.METHODS}
    assert tried["whitened"] == {"uniform", "owl", "angular", "spectrum", "fisher"}
    assert tried["plain"] == tried["whitened"] - {"fisher"}
    assert tried["oats"] == {"uniform", "owl", "angular"}
