"""Names of matrices that PEFT reads in another way than they are written, or that it refuses."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_misread(model: nn.Module, name: str) -> bool:
    """Whether PEFT reads the last part of a module's name as the earlier name of a matrix of experts.

    For adapters that were trained with transformers 4, PEFT replaces names such as "gate_proj" and "up_proj", in some
    types of mixtures, by the bank of experts that now holds these matrices. It does so with a shared expert or an MLP
    beside the experts as well, which would get no adapter. A parameter's name, "gate_proj.weight", is not replaced.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a version that replaces no names
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of several matrices that are one parameter of the bank
        return True
    return name not in (config.target_modules or ())


def is_refused(model: nn.Module, name: str) -> bool:
    """Whether PEFT adds no LoRA to modules whose name ends in this part.

    It refuses the output projections of Mamba in some types of models, because kernels multiply by their weights.
    """
    from peft import LoraConfig, LoraModel

    check: Any = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is None:  # a version that refuses none
        return False
    try:
        check(None, LoraConfig(target_modules=[name]), model, name)
    except ValueError:
        return True
    return False
