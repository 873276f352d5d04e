"""Shampoo for language models that train with PyTorch FSDP2."""

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.model_groups import head_settings, param_groups
from shampoo_fsdp.optimizer import Shampoo

__version__ = "0.1.0"

__all__ = ["Shampoo", "ShampooConfig", "__version__", "head_settings", "param_groups"]
