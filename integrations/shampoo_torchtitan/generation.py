"""Which TorchTitan is installed."""

import sys
from importlib.metadata import version

__all__ = ["JOBS_ARE_FUNCTIONS", "need_02"]

JOBS_ARE_FUNCTIONS = tuple(int(n) for n in version("torchtitan").split(".")[:2]) >= (0, 3)
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""


def need_02(what: str) -> None:
    """Ends the process if what it does trains models of TorchTitan 0.2."""
    if JOBS_ARE_FUNCTIONS:
        sys.exit(
            f"{what} trains models of TorchTitan 0.2, and {version('torchtitan')} is installed: "
            "`TITAN=0.2.2 ./run_tests.sh -h` makes an environment for it, ./.venv-0.2.2"
        )
