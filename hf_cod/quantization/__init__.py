"""Three and four bits a weight: layers that matter less get three, the others bitsandbytes' NF4."""

from hf_cod.quantization.config import OwlBnbConfig
from hf_cod.quantization.linear import Linear3bit
from hf_cod.quantization.quantize import quantize
from hf_cod.quantization.quantizer import OwlBnbQuantizer

__all__ = ["Linear3bit", "OwlBnbConfig", "OwlBnbQuantizer", "quantize"]
