"""Shampoo for language models that train with PyTorch FSDP2."""

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.optimizer import Shampoo

__all__ = ["Shampoo", "ShampooConfig"]
