"""Quantization to three and four bits: layers with low scores get three bits, the others bitsandbytes' NF4."""
