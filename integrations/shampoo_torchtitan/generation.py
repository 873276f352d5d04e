"""Which TorchTitan is installed, and all that differs between versions."""

import importlib.util
from pathlib import Path
from typing import Any


def file_of_titan(part: str) -> Path | None:
    """Where it is, a folder or a file; None if this TorchTitan has none.

    Versions are told by what is in them: builds and forks of many call themselves 0.0.0.
    """
    found = importlib.util.find_spec("torchtitan")
    folders = (found and found.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder, part)).exists()), None)


JOBS_ARE_FUNCTIONS = file_of_titan("trainer.py") is not None
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""

TEXT_IS_OF_GRAIN = file_of_titan("components/data") is not None
"""Since August 2026."""


def titan() -> Any:
    """All that differs with 0.3: the module `titan_02` or `titan_03`, whose names are the same.
    (Without a GPU it needs `cpu` to be enabled first.)"""
    return _ours("titan_03" if JOBS_ARE_FUNCTIONS else "titan_02")


def text() -> Any:
    """All that differs where Grain reads text and a batch is one row of tokens: the module
    `text_03` or `text_04`, whose names are the same."""
    return _ours("text_04" if TEXT_IS_OF_GRAIN else "text_03")


def groups() -> Any:
    """All that differs with 0.4, where optimizers are classes that a job names: the module
    `groups_03` or `groups_04`, whose names are the same."""
    optimizers = importlib.import_module("torchtitan.components.optimizer")
    return _ours("groups_04" if hasattr(optimizers, "BaseOptimizer") else "groups_03")


def register_demo() -> None:
    """Makes known to TorchTitan what the demo job trains, in a clone; wheels are without it."""
    if importlib.util.find_spec("shampoo_torchtitan.demo"):
        _ours("demo").register()


def _ours(module: str) -> Any:
    return importlib.import_module(f"shampoo_torchtitan.{module}")


def parallel_dims(config: Any, world_size: int) -> Any:
    """A job's ParallelDims; a ValueError if its degrees do not make so many ranks."""
    try:
        return titan().parallel_dims(config, world_size)
    except AssertionError as error:
        raise ValueError(
            f"[parallelism]: the degrees do not make {world_size} ranks. {error}"
        ) from None
