"""Shampoo for TorchTitan: importing this package is all that a job needs.

TorchTitan imports it when the job file says so; the launcher `shampoo_torchtitan.train` does so
unasked:

    [job]
    custom_config_module = "shampoo_torchtitan.job_config"

    [experimental]
    custom_import = "shampoo_torchtitan"

    [optimizer]
    name = "shampoo"

What helps the demo job alone is in `demo`.
"""

import gc

_collects = gc.isenabled()
gc.disable()  # there is nothing to collect while modules are read; looking takes a second
try:
    from shampoo_torchtitan.demo import cpu

    if cpu.needed():
        cpu.enable()  # first: TorchTitan reads the device when it is imported

    from shampoo_torchtitan import checkpoint, demo, metrics, optimizer
finally:
    if _collects:
        gc.enable()

__all__ = ["register"]


def register() -> None:
    """Makes Shampoo, its metrics and checkpoints known to TorchTitan, and what the demo trains.

    Calling it again changes nothing.
    """
    optimizer.register()
    metrics.register()
    checkpoint.register()
    demo.register()


register()
