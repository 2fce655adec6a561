"""Three and four bits a weight: layers that matter less get three, the others bitsandbytes' NF4."""

from hf_cod.quantization.config import OwlBnbConfig
from hf_cod.quantization.linear import Linear3bit
from hf_cod.quantization.plan import BitPlan, plan_bits
from hf_cod.quantization.quantize import quantize
from hf_cod.quantization.quantizer import OwlBnbQuantizer

__all__ = ["BitPlan", "Linear3bit", "OwlBnbConfig", "OwlBnbQuantizer", "plan_bits", "quantize"]
