"""Which TorchTitan is installed, and all that differs between versions."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "JOBS_ARE_FUNCTIONS",
    "TEXT_IS_OF_GRAIN",
    "groups",
    "need_02",
    "parallel_dims",
    "register_demo",
    "text",
    "titan",
]


def _titan_has(part: str) -> bool:
    """By what is in it: builds and forks of many versions call themselves 0.0.0."""
    found = importlib.util.find_spec("torchtitan")
    folders = (found and found.submodule_search_locations) or ()
    return any(Path(folder, part).exists() for folder in folders)


JOBS_ARE_FUNCTIONS = _titan_has("trainer.py")
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""

TEXT_IS_OF_GRAIN = _titan_has("components/data")
"""Since August 2026."""


def titan() -> Any:
    """All that differs with 0.3: the module `titan_02` or `titan_03`, whose names are the same.
    (Without a GPU it needs `cpu` to be enabled first.)"""
    module = "titan_03" if JOBS_ARE_FUNCTIONS else "titan_02"
    return importlib.import_module(f"shampoo_torchtitan.{module}")


def text() -> Any:
    """All that differs where Grain reads text and a batch is one row of tokens: the module
    `text_03` or `text_04`, whose names are the same."""
    module = "text_04" if TEXT_IS_OF_GRAIN else "text_03"
    return importlib.import_module(f"shampoo_torchtitan.{module}")


def register_demo() -> None:
    """Makes known to TorchTitan what the demo job trains, in a clone; wheels are without it."""
    if importlib.util.find_spec("shampoo_torchtitan.demo"):
        importlib.import_module("shampoo_torchtitan.demo").register()


def groups() -> Any:
    """All that differs with 0.4, where optimizers are classes that a job names: the module
    `groups_03` or `groups_04`, whose names are the same."""
    optimizers = importlib.import_module("torchtitan.components.optimizer")
    module = "groups_04" if hasattr(optimizers, "BaseOptimizer") else "groups_03"
    return importlib.import_module(f"shampoo_torchtitan.{module}")


def parallel_dims(config: Any, world_size: int) -> Any:
    """A job's ParallelDims; a ValueError if its degrees do not make so many ranks."""
    try:
        return titan().parallel_dims(config, world_size)
    except AssertionError as error:
        raise ValueError(
            f"[parallelism]: the degrees do not make {world_size} ranks. {error}"
        ) from None


def need_02(what: str) -> None:
    """Ends the process if what it does trains models of TorchTitan 0.2."""
    if JOBS_ARE_FUNCTIONS:
        sys.exit(
            f"{what} trains models of TorchTitan 0.2, and a newer one is installed: "
            "`TITAN=0.2.2 ./run_tests.sh -h` makes an environment for it, ./.venv-0.2.2"
        )
