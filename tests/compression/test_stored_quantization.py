import pytest

from hf_cod.compression.quantization.config import OwlBnbConfig
from hf_cod.compression.sparse.config import SparseConfig
from hf_cod.compression.stored_quantization import StoredQuantization


@pytest.mark.parametrize("kind", [OwlBnbConfig, SparseConfig])
def test_what_is_written_is_read_and_what_a_later_version_adds_is_refused(kind):
    written = kind().to_dict()
    read = kind.from_dict(written)
    assert isinstance(read, StoredQuantization) and read.to_dict() == written
    with pytest.raises(ValueError, match=r"quantization_config: expected .*, got 'later'; pip install -U hf_cod"):
        kind.from_dict({**written, "later": 1})
