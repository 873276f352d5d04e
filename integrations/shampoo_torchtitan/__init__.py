"""Shampoo for TorchTitan.

TorchTitan 0.2 imports it when the job file says so; the launcher `shampoo_torchtitan.train` does so
unasked:

    [job]
    custom_config_module = "shampoo_torchtitan.job_config"

    [experimental]
    custom_import = "shampoo_torchtitan"

    [optimizer]
    name = "shampoo"

From 0.3 on a job is a function; see `shampoo_torchtitan.configs`. From 0.4 on a job's container
may list `Shampoo.Config(pattern=...)`.

Jobs of other optimizers are TorchTitan's alone, whatever has been imported. What helps the demo job
alone is in `demo`, which wheels are without.
"""

import sys
from typing import Any

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

__all__ = ["Shampoo", "register"]


def __getattr__(name: str) -> Any:
    if name != "Shampoo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        # Here, as above: and there is none before TorchTitan 0.4.
        from shampoo_torchtitan.groups_04 import Shampoo
    except ImportError as error:
        raise ImportError(
            "shampoo_torchtitan.Shampoo needs the optimizers of TorchTitan 0.4; with 0.3 use "
            f"shampoo_torchtitan.configs.shampoo ({error})"
        ) from None
    return Shampoo


def register() -> None:
    """Makes Shampoo known to TorchTitan, and what the demo trains.

    Calling it again changes nothing.
    """
    # Here: without a GPU TorchTitan cannot be imported before `cpu` is enabled.
    from shampoo_torchtitan.generation import titan

    titan().register()


if "torchtitan" in sys.modules and not JOBS_ARE_FUNCTIONS:
    register()  # TorchTitan imports this package for a job, and says no more to it
