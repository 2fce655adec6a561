import pytest
import torch
from safetensors import safe_open

from hf_cod.io.tensors import is_whole, save_tensors

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_the_order_of_metadata_does_not_change_the_file(tmp_path):
    first = save_tensors(tmp_path / "first", TENSORS, {"x": "1", "y": "2", "z": "3"})
    second = save_tensors(tmp_path / "second", TENSORS, {"z": "3", "y": "2", "x": "1"})
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        assert file.metadata() == {"x": "1", "y": "2", "z": "3"} and torch.equal(file.get_tensor("a"), TENSORS["a"])


@pytest.mark.parametrize("place", [20, -1], ids=["header", "data"])
def test_one_changed_byte_is_seen(place, tmp_path):
    path = save_tensors(tmp_path / "file", TENSORS, {"x": "1"}, checked=True)
    assert is_whole(path, {"x"})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert not is_whole(path, {"x"})
