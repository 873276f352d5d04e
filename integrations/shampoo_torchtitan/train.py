"""TorchTitan's training, with Shampoo known, on GPUs or on the CPU.

torchrun --nproc_per_node 2 -m shampoo_torchtitan.train --job.config_file my.toml
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from shampoo_torchtitan import cpu

if cpu.needed():
    cpu.enable()  # first: TorchTitan reads the device when it is imported

import torchtitan.train
from torchtitan.tools.logging import logger

from shampoo_torchtitan.container import JobError
from shampoo_torchtitan.generation import parallel_dims, titan

_titan = titan()
_titan.register()


BAD_SETTINGS = (AssertionError, ImportError, NotImplementedError, OSError, TypeError, ValueError)
"""What reading a job raises, here and in TorchTitan."""
_BAD_SETTING = 2  # exit code, that of argparse; launch.py knows it


class JobReader(_titan.Reader):  # type: ignore[name-defined,misc]
    """Reads a job as TorchTitan does, with our settings in it even if it does not ask for them."""

    def parse_args(self, args: list[str] | None = None) -> Any:
        """Reads the job, or ends the process with one readable message."""
        try:
            config = super().parse_args(sys.argv[1:] if args is None else args)
            changes = _titan.fit_to_cpu(config) if cpu.needed() else []
            parallel_dims(config, int(os.environ.get("WORLD_SIZE", "1")))
        except BAD_SETTINGS as error:
            print(f"Bad job settings: {error}", file=sys.stderr, flush=True)
            _leave_after_the_rank_that_is_shown()
        except SystemExit as bad_argument:
            if bad_argument.code == _BAD_SETTING:
                _leave_after_the_rank_that_is_shown()
            raise
        if changes:
            logger.info(f"No GPU: training on the CPU with {', '.join(changes)}")
        return _titan.with_trainer(config, Trainer)


class Trainer(torchtitan.train.Trainer):  # type: ignore[misc]
    """TorchTitan's Trainer; tells errors in a sentence."""

    def __init__(self, config: Any) -> None:
        init = cpu.MeshIndependentInit() if cpu.needed() else contextlib.nullcontext()
        with init, _readable_errors():
            super().__init__(config)
        self._job = config
        self._trained = False

    def train_step(self, data_iterator: Any) -> None:
        self._trained = True
        super().train_step(data_iterator)

    def train(self) -> None:
        with _readable_errors():
            super().train()
        if not self._trained and dist.get_rank() == 0:
            logger.warning(
                f"Nothing to train: a checkpoint already has step {self.step} of training.steps = "
                f"{self._job.training.steps}. Ask for more steps, or start anew with another "
                "--job.dump_folder"
            )


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except JobError as error:  # on every rank, wherever it happened
        print(error, file=sys.stderr, flush=True)
        _leave_after_the_rank_that_is_shown()


def _leave_after_the_rank_that_is_shown() -> None:
    """Ends this rank. All ranks have the same to say, and torchrun ends all when the first ends.

    So the ranks whose output torchrun shows end first.
    """
    shown = os.environ.get("LOG_RANK", "0").split(",")
    if os.environ.get("LOCAL_RANK", "0") not in shown:
        time.sleep(10)
    sys.exit(_BAD_SETTING)


def main() -> None:
    """Trains the job that the command line describes."""
    # TorchTitan's data loader calls it; nothing that a user could do about it.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    torchtitan.train.ConfigManager = JobReader  # type: ignore[misc]
    try:
        _titan.main(Trainer)
    finally:
        # A process that ends with gloo's threads running is now and then aborted (SIGABRT,
        # "terminate called without an active exception"), whatever it has said before.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
