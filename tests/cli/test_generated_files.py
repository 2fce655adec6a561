"""Changed files of every kind at the command line: one line and exit 2 with nothing written, or the same results."""

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.cli.changed_files import Place, called_from, read_whole
from tests.cli.read_files import KINDS, make
from tests.io.mutations import mutated

LONG = 300
SHOWN = 5
CASES = [
    *((name, kind.few) for name, kind in KINDS.items()),
    *(pytest.param(name, LONG, marks=pytest.mark.slow) for name in KINDS),
]


def mutations(content):
    """Most of a file's own form, since what has another one is refused before its entries are looked at."""
    return st.integers(0, 2).flatmap(lambda part: mutated(content, damaged=part == 0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


@pytest.mark.parametrize("name, examples", CASES)
def test_a_changed_file_is_refused_or_changes_nothing(name, examples, whole, tmp_path, capsys):
    kind = KINDS[name]
    complaints = []
    with called_from(tmp_path):
        place = Place(kind, whole, tmp_path)

        @seed(0)
        @settings(max_examples=examples, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
        @given(mutations(read_whole(kind, tmp_path)))
        def check(raw):
            complaint = place.complaint(raw, lambda: capsys.readouterr().err)
            if complaint is not None:
                complaints.append(f"{complaint}\n    with {raw[:300]!r}")

        check()
    assert not complaints, f"{len(complaints)} of {examples} are wrong:\n" + "\n".join(complaints[:SHOWN])
