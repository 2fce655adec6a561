"""A smaller model learns from the one that it came from: what it lost is recovered, what it saved stays saved."""

from hf_cod.healing.healer import heal
from hf_cod.healing.settings import HealSettings

__all__ = ["HealSettings", "heal"]
