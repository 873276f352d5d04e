"""Text, batches and attention as TorchTitan 0.3 has them, and files say them."""

from typing import Any

from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.attention import ScaledDotProductAttention

KEYS = ()
"""Settings of files that :func:`take` alone knows."""


def take(config: Any, settings: dict[str, Any]) -> None:
    """Sets what the settings of a file say of text and batches; what is used is taken out."""
    config.dataloader = HuggingFaceTextDataLoader.Config()


def attention(config: Any) -> Any:
    """The configuration of attention that needs no GPU."""
    return ScaledDotProductAttention.Config()
