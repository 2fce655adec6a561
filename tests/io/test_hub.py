"""Names that are no directory: one look at the Hub, and one line if it cannot be reached."""

import socket

import huggingface_hub.constants
import pytest

from hf_cod.cli.main import main
from hf_cod.io.hub import on_hub, why_unreachable
from hf_cod.io.models import load_model, load_tokenizer
from hf_cod.io.text import load_texts


@pytest.fixture
def attempts(monkeypatch):
    """The look-ups of server names on a machine without network, which fail; not in offline mode."""
    found = []

    def refuse(host, *others, **named):
        found.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


@pytest.mark.parametrize("name", ["no-such-directory", "someone/no-such-model"])
def test_a_name_without_directory_fails_after_one_attempt(name, attempts, tmp_path, capsys):
    """Transformers alone retries five times."""
    said = f"got {name!r}: there is no such directory, it is not in the cache of the Hub, and the Hub cannot be reached"
    with pytest.raises(ValueError, match=f"model: expected .* {said} .*Name or service"):
        load_model(name)
    with pytest.raises(ValueError, match=f"tokenizer: expected .* {said}"):
        load_tokenizer(name)
    assert len(attempts) <= 3, "one each, and the first one of huggingface_hub itself in this process"
    del attempts[:]
    assert main(["diagnose", name, "--output", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("hf-cod diagnose: error: model: expected") and len(attempts) == 1


def test_a_dataset_that_cannot_be_looked_up_fails_after_one_attempt(attempts):
    said = "got 'no-such-text': there is no such file, it is not in the cache of the Hub, and the Hub cannot be"
    on_hub("someone/model")  # the first look-up of a process is one of huggingface_hub itself
    del attempts[:]
    with pytest.raises(ValueError, match=f"text: expected a text file or a dataset name, {said} reached"):
        load_texts(text="no-such-text")
    assert len(attempts) == 1


def test_what_looks_like_a_path_is_not_looked_up(attempts):
    with pytest.raises(ValueError, match=r"got '\./here', which does not exist"):
        load_model("./here")
    assert attempts == []


def test_the_answer_of_the_hub_is_explained_by_the_look_up(attempts, monkeypatch):
    """Also what is cached, and errors after which another attempt may help."""
    monkeypatch.setattr("hf_cod.io.hub.try_to_load_from_cache", lambda *names, **options: "config.json")
    assert why_unreachable("someone/model") is None and attempts == []
    monkeypatch.undo()
    slow = type("ReadTimeout", (Exception,), {"__module__": "httpx"})
    for error in (OSError("no such repository"), slow("slow")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        answer = lambda *names, error=error, **options: fail(error)  # noqa: E731
        monkeypatch.setattr("hf_cod.io.hub.HfApi.model_info", answer)
        assert why_unreachable("someone/model") is None
        assert not on_hub("someone/model")
    monkeypatch.setattr("hf_cod.io.hub.HfApi.model_info", lambda *names, **options: fail(KeyError("a bug")))
    for look in (on_hub, lambda name: why_unreachable(name)):
        with pytest.raises(KeyError, match="a bug"):
            look("someone/model")


def fail(error):
    raise error


def test_the_hub_is_out_of_reach_offline():
    assert on_hub("someone/no-such-model") is False
    assert why_unreachable("someone/no-such-model") is None, "nothing is retried"
