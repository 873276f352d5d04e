"""Which TorchTitan is installed, and all that differs between the two."""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from shampoo_fsdp import ShampooConfig

__all__ = ["JOBS_ARE_FUNCTIONS", "Titan", "need_02", "parallel_dims", "titan"]


class Titan(Protocol):
    """What differs between generations of TorchTitan; `titan_02` and `titan_03` have one each."""

    Reader: type[Any]
    """TorchTitan's ConfigManager, with Shampoo's settings in every job."""
    loads_remote_folders: bool = True
    """Whether a job goes on from checkpoints in `s3://...` and the like."""

    def register(self) -> None:
        """Make Shampoo, and what the demo trains, known to TorchTitan."""

    def parallel_dims(self, config: Any, world_size: int) -> Any:
        """A job's ParallelDims; an AssertionError if its degrees do not fit."""

    def fit_to_cpu(self, config: Any) -> list[str]:
        """Change what cannot work without a GPU; one `table.key = value` for each change."""

    def with_trainer(self, config: Any, trainer: type[Any]) -> Any:
        """The job, for this trainer in the place of TorchTitan's own."""
        return config

    def main(self, trainer: type[Any]) -> None:
        """Run TorchTitan's launcher."""

    def model_of(self, config: Any) -> str:
        """The name and flavor of the model."""

    def shampoo_of(self, config: Any, names: Sequence[str]) -> ShampooConfig:
        """The settings that parameters of these names get."""

    def keep_parameters_alone(self, config: Any) -> None:
        """Do what the trainer does first, and switch off what changes no parameter."""

    def model_parts(self, config: Any, dims: Any) -> list[nn.Module]:
        """The parts of the model on this rank, parallelized, without memory."""


def _jobs_are_functions() -> bool:
    """By what is in it: builds and forks of many versions call themselves 0.0.0."""
    found = importlib.util.find_spec("torchtitan")
    folders = (found and found.submodule_search_locations) or ()
    return any(Path(folder, "trainer.py").exists() for folder in folders)


JOBS_ARE_FUNCTIONS = _jobs_are_functions()
"""From 0.3 on a job is a Python function that returns its configuration, and TOML files are one
kind of them here; before, a job is a TOML file."""


@functools.cache
def titan() -> Titan:
    """The one that is installed. (Without a GPU it needs `demo.cpu` to be enabled first.)"""
    if JOBS_ARE_FUNCTIONS:
        from shampoo_torchtitan.titan_03 import Titan03

        return Titan03()
    from shampoo_torchtitan.titan_02 import Titan02

    return Titan02()


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
