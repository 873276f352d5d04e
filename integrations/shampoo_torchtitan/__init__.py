"""Shampoo for TorchTitan.

TorchTitan 0.2 imports it when the job file says so; the launcher `shampoo_torchtitan.train` does so
unasked:

    [job]
    custom_config_module = "shampoo_torchtitan.job_config"

    [experimental]
    custom_import = "shampoo_torchtitan"

    [optimizer]
    name = "shampoo"

From 0.3 on a job is a function; see `shampoo_torchtitan.configs`.

Jobs of other optimizers are TorchTitan's alone, whatever has been imported. What helps the demo job
alone is in `demo`, which wheels are without.
"""

import sys

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

__all__ = ["register"]


def register() -> None:
    """Makes Shampoo known to TorchTitan, and what the demo trains.

    Calling it again changes nothing.
    """
    # Here: without a GPU TorchTitan cannot be imported before `cpu` is enabled.
    from shampoo_torchtitan.generation import titan

    titan().register()


if "torchtitan" in sys.modules and not JOBS_ARE_FUNCTIONS:
    register()  # TorchTitan imports this package for a job, and says no more to it
