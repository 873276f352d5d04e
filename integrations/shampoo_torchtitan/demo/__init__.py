"""What the demo job needs; a job of your own on GPUs uses nothing of it.

`configs/llama3_small_cpu.toml`, and the tests and the study as well, train a small Llama (`models`)
on text that is on every machine (`data`), with a tokenizer that needs no download
(`byte_tokenizer`), and where there is no GPU, on the CPU (`cpu`). All but the last have names of
their own, so that a job which names none of them is TorchTitan's and Shampoo's alone.
"""

__all__ = ["register"]


def register() -> None:
    """Makes our data sets and models known to TorchTitan. Calling it again changes nothing."""
    # Here: both import TorchTitan, and `cpu` must come before that.
    from shampoo_torchtitan.demo import data
    from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

    if JOBS_ARE_FUNCTIONS:
        from shampoo_torchtitan.demo import models_03 as models
    else:
        from shampoo_torchtitan.demo import models_02 as models

    data.register()
    models.register()
