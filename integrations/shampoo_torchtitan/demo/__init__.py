"""What the demo job needs; a job of your own on GPUs uses nothing of it.

`configs/llama3_small_cpu.toml`, and the tests and the study as well, train a small Llama (`models`)
on text that is on every machine (`data`), with a tokenizer that needs no download
(`byte_tokenizer`), and where there is no GPU, on the CPU (`cpu`). All but the last have names of
their own, so that a job which names none of them is TorchTitan's and Shampoo's alone.
"""

from pathlib import Path
from types import ModuleType

__all__ = ["BYTE_TOKENIZER", "VOCABULARY", "register"]

BYTE_TOKENIZER = Path(__file__).parent / "byte_tokenizer"
"""A tokenizer of the 256 bytes, and of begin and end of text."""

VOCABULARY = 260
"""Of a model for it: divisible by 4, for tensor parallelism."""


def register(models: ModuleType) -> None:
    """Makes our data sets and models known to TorchTitan. Calling it again changes nothing.

    Args:
        models: `models_02` or `models_03`.
    """
    from shampoo_torchtitan.demo import data  # here: `cpu` must come before TorchTitan

    data.register()
    models.register()
