"""Which TorchTitan is installed."""

import importlib.util
import sys
from pathlib import Path

__all__ = ["JOBS_ARE_FUNCTIONS", "need_02"]


def _has(file: str) -> bool:
    """Whether TorchTitan has it; builds and forks of many versions call themselves 0.0.0."""
    found = importlib.util.find_spec("torchtitan")
    return any(
        Path(root, file).exists() for root in (found and found.submodule_search_locations) or ()
    )


JOBS_ARE_FUNCTIONS = _has("trainer.py")
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""


def need_02(what: str) -> None:
    """Ends the process if what it does trains models of TorchTitan 0.2."""
    if JOBS_ARE_FUNCTIONS:
        sys.exit(
            f"{what} trains models of TorchTitan 0.2, and a newer one is installed: "
            "`TITAN=0.2.2 ./run_tests.sh -h` makes an environment for it, ./.venv-0.2.2"
        )
