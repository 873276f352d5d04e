"""What the demo job needs; it is in clones alone, not in wheels.

`configs/llama3_small_cpu.toml`, and the tests and the study as well, train a small Llama (`models`)
on text that is on every machine (`data`), with a tokenizer that needs no download
(`byte_tokenizer`). They have names of their own, so that a job which names none of them is
TorchTitan's and Shampoo's alone.
"""

from importlib import import_module
from pathlib import Path

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS, TEXT_IS_OF_GRAIN

BYTE_TOKENIZER = Path(__file__).parent / "byte_tokenizer"
"""A tokenizer of the 256 bytes, and of begin and end of text."""

VOCABULARY = 260
"""Of a model for it: divisible by 4, for tensor parallelism."""


def register() -> None:
    """Makes our data sets and models known to TorchTitan. Calling it again changes nothing."""
    # Here: `cpu` must come before TorchTitan.
    data = "data_04" if TEXT_IS_OF_GRAIN else "data_03"
    models = "models_03" if JOBS_ARE_FUNCTIONS else "models_02"
    for name in (data, models):
        import_module(f"shampoo_torchtitan.demo.{name}").register()
