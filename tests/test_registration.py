"""transformers knows our models and formats, whichever is imported first."""

import subprocess
import sys

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import hf_cod
import hf_cod.models
from hf_cod._registration import ADAPTERS, CONFIGS, FORMATS, REQUIRES, Late
from hf_cod.compression.quantization.config import METHOD as BITS
from hf_cod.compression.sparse.config import METHOD as SPARSE
from hf_cod.models import FAMILIES
from hf_cod.models.stored_config import StoredConfig
from hf_cod.training.adapters.registry import NAME

CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
config = AutoConfig.for_model("cod_llama", **sizes, num_hidden_layers=1, vocab_size=16)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "CodLlamaForCausalLM"
"""


def test_the_tables_name_what_there_is():
    assert CONFIGS.keys() == {"cod_shaped", REQUIRES, *(family.model_type for family in FAMILIES)}
    for model_type, place in CONFIGS.items():
        assert Late(*place).load().model_type == model_type and model_type in CONFIG_MAPPING
    assert ADAPTERS.keys() == {NAME, REQUIRES} and StoredConfig.model_type == REQUIRES
    for peft_type, place in ADAPTERS.items():
        assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is Late(*place).load()
    assert FORMATS.keys() == {BITS, SPARSE}
    for method, (config, quantizer) in FORMATS.items():
        assert Late(*config).load()().quant_method == method
        assert issubclass(Late(*quantizer).load(), object)
        assert isinstance(AUTO_QUANTIZATION_CONFIG_MAPPING[method], Late)
        assert isinstance(AUTO_QUANTIZER_MAPPING[method], Late)


@pytest.mark.process
@pytest.mark.parametrize(
    "first",
    [
        "import hf_cod.models.configuration_cod_llama",
        "from hf_cod import OwLoreConfig",
        pytest.param("import hf_cod; from transformers import LlamaForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_whichever_is_imported_first(first):
    subprocess.run([sys.executable, "-c", first + CHECK], check=True)


def test_register_has_its_old_name_for_one_release():
    with pytest.warns(DeprecationWarning, match=r"register is now called hf_cod\.models\.register"):
        assert hf_cod.register is hf_cod.models.register
