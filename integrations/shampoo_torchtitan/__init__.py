"""Shampoo for TorchTitan: importing this package is all that a job needs.

TorchTitan imports it when the job file says so; the launcher `shampoo_torchtitan.train` does so
unasked:

    [job]
    custom_config_module = "shampoo_torchtitan.job_config"

    [experimental]
    custom_import = "shampoo_torchtitan"

    [optimizer]
    name = "shampoo"
"""

from shampoo_torchtitan import cpu

if cpu.needed():
    cpu.enable()  # first: TorchTitan reads the device when it is imported

from shampoo_torchtitan import data, metrics, models, optimizer

__all__ = ["register"]


def register() -> None:
    """Makes Shampoo, its metrics, our data sets and model flavors known to TorchTitan.

    Calling it again changes nothing.
    """
    optimizer.register()
    metrics.register()
    data.register()
    models.register()


register()
