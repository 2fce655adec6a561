import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cod.io.gguf_file import read_gguf, write_gguf

KEYS = {"general.type": "imatrix", "imatrix.datasets": ["a.txt", "others"], "imatrix.chunk_count": 3}
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 1), np.float32)}


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "a.gguf", KEYS, TENSORS)


def test_the_package_reads_what_is_written(file):
    read = gguf.GGUFReader(file)
    assert {name: read.get_field(name).contents() for name in KEYS} == KEYS
    for tensor, (name, expected) in zip(read.tensors, TENSORS.items(), strict=True):
        assert tensor.name == name and np.array_equal(tensor.data, expected)


def test_what_the_package_writes_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_string("text", "a ü")
    writer.add_array("numbers", [1, 2])
    writer.add_float64("large", 1e300)
    writer.add_bool("yes", True)
    for name, tensor in TENSORS.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "b.gguf", "file")
    expected = {"general.architecture": "llama", "text": "a ü", "numbers": [1, 2], "large": 1e300, "yes": True}
    assert read.keys == expected and read.tensors.keys() == TENSORS.keys()
    assert all(np.array_equal(read.tensors[name], TENSORS[name]) for name in TENSORS)


def test_no_tensor_and_no_key(tmp_path):
    read = read_gguf(write_gguf(tmp_path / "c.gguf", {}, {}), "file")
    assert not read.keys and not read.tensors


def at(raw, find, skip, format, value):
    place = raw.index(find) + skip
    return raw[:place] + struct.pack(f"<{format}", value) + raw[place + struct.calcsize(f"<{format}") :]


CHANGES = {
    "expected a GGUF file, got one that begins with": lambda raw: b"GGUX" + raw[4:],
    "expected GGUF version 2 or 3, little-endian, got 50331648": lambda raw: at(raw, b"GGUF", 4, "I", 3 << 24),
    "expected a complete GGUF file, got one cut off": lambda raw: raw[:20],
    "got one that ends before 1152921504606846976 entries": lambda raw: at(raw, b"GGUF", 16, "Q", 1 << 60),
    "got one that ends before 1073741824 entries": lambda raw: at(raw, b"imatrix.datasets", 24, "Q", 1 << 30),
    "expected lists of plain values, got a list of lists": lambda raw: at(raw, b"imatrix.datasets", 20, "I", 9),
    "expected a GGUF type of value, got 77": lambda raw: at(raw, b"imatrix.chunk_count", 19, "I", 77),
    "expected each name once, got 'a' twice": lambda raw: raw.replace(
        struct.pack("<Q", 1) + b"b", b"\1" + bytes(7) + b"a"
    ),
    "a: expected 1 to 4 dimensions, got 9": lambda raw: at(raw, struct.pack("<Q", 1) + b"a", 9, "I", 9),
    "a: expected float32 (GGUF type 0), got GGUF type 12": lambda raw: at(
        raw, struct.pack("<Q", 1) + b"a", 29, "I", 12
    ),
    "a: expected a tensor within the file of": lambda raw: at(raw, struct.pack("<Q", 1) + b"a", 13, "Q", 1 << 62),
    "b: expected a tensor within the file of": lambda raw: at(raw, struct.pack("<Q", 1) + b"b", 33, "Q", 1 << 63),
    "expected text in UTF-8": lambda raw: raw.replace(b"a.txt", b"\xff.txt"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_hostile_files(file, said):
    raw = file.read_bytes()
    changed = CHANGES[said](raw)
    assert changed != raw
    file.write_bytes(changed)
    with pytest.raises(ValueError) as caught:
        read_gguf(file, "statistics")
    assert said in str(caught.value) and repr(str(file)) in str(caught.value)


def test_alignment_is_that_of_the_file(tmp_path):
    keys = {**KEYS, "general.alignment": 64}
    raw = write_gguf(tmp_path / "d.gguf", keys, {}).read_bytes()
    assert read_gguf(tmp_path / "d.gguf", "file").keys == keys and raw
    write_gguf(tmp_path / "e.gguf", {"general.alignment": 0}, TENSORS)
    with pytest.raises(ValueError, match=r"file: expected general.alignment within the file, got 0"):
        read_gguf(tmp_path / "e.gguf", "file")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_or_other_numbers(tmp_path_factory, data):
    file = write_gguf(tmp_path_factory.getbasetemp() / "damaged.gguf", KEYS, TENSORS)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else raw)
    try:
        read_gguf(file, "file")
    except ValueError as error:
        assert "expected" in str(error)
