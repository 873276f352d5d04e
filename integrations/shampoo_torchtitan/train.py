"""TorchTitan's training, with Shampoo known, on GPUs or on the CPU.

torchrun --nproc_per_node 2 -m shampoo_torchtitan.train --job.config_file my.toml

Of `demo` it uses the tokenizer where the job names that one, and `cpu` where there is no GPU.
"""

import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shampoo_torchtitan.demo import cpu
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

_collects = gc.isenabled()
gc.disable()  # there is nothing to collect while modules are read; looking takes a second
try:
    if cpu.needed():
        cpu.enable()  # first: TorchTitan reads the device when it is imported

    import torchtitan.train
    from torchtitan.tools.logging import logger

    from shampoo_torchtitan import job_config, register
    from shampoo_torchtitan.checkpoint import CheckpointError
    from shampoo_torchtitan.container import BadSetting

    if JOBS_ARE_FUNCTIONS:
        from torchtitan.config.override import derive

        from shampoo_torchtitan.jobs_03 import Reader, TitanTrainer, fit_to_cpu
    else:
        from shampoo_torchtitan.jobs_02 import Reader, TitanTrainer, fit_to_cpu
finally:
    if _collects:
        gc.enable()

register()

__all__ = ["JobReader", "Trainer", "main"]

_BAD_SETTING = 2  # exit code, that of argparse; launch.py knows it


class JobReader(Reader):
    """Reads a job as TorchTitan does, with our settings in it even if it does not ask for them."""

    def parse_args(self, args: list[str] | None = None) -> Any:
        """Reads the job, or ends the process with one readable message."""
        try:
            config = super().parse_args(sys.argv[1:] if args is None else args)
            changes = fit_to_cpu(config) if cpu.needed() else []
            job_config.check_degrees(config, int(os.environ.get("WORLD_SIZE", "1")))
        except BrokenPipeError:  # --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (ImportError, TypeError, ValueError, OSError) as error:
            print(f"Bad job settings: {error}", file=sys.stderr, flush=True)
            _leave_after_the_rank_that_is_shown()
        except SystemExit as bad_argument:
            if bad_argument.code == _BAD_SETTING:
                _leave_after_the_rank_that_is_shown()
            raise
        if changes:
            logger.info(f"No GPU: training on the CPU with {', '.join(changes)}")
        if JOBS_ARE_FUNCTIONS and type(config) is TitanTrainer.Config:
            config = derive(config, Trainer.Config)
        return config


class Trainer(TitanTrainer):
    """TorchTitan's Trainer; says at the end where the results are."""

    if JOBS_ARE_FUNCTIONS:  # there a config builds the class that it is a part of

        @dataclass(kw_only=True, slots=True)
        class Config(TitanTrainer.Config):
            pass

    def __init__(self, config: Any) -> None:
        init = cpu.mesh_independent_init() if cpu.needed() else contextlib.nullcontext()
        with init, _readable_errors():
            super().__init__(config)
        self._trained = False

    def train_step(self, data_iterator: Any) -> None:
        self._trained = True
        super().train_step(data_iterator)

    def train(self) -> None:
        with _readable_errors():
            super().train()
        if dist.get_rank() == 0:
            self._say_where()

    def _say_where(self) -> None:
        config: Any = self.config if JOBS_ARE_FUNCTIONS else self.job_config
        checkpoint, metrics = config.checkpoint, config.metrics
        outputs = config.dump_folder if JOBS_ARE_FUNCTIONS else config.job.dump_folder
        folder = getattr(self.checkpointer, "folder", outputs)
        if not self._trained:
            logger.warning(
                f"Nothing to train: {folder} already has step {self.step} of "
                f"training.steps = {config.training.steps}. Ask for more steps, or "
                "start anew with another --job.dump_folder"
            )
        if checkpoint.enable and not checkpoint.load_only:
            logger.info(f"Checkpoint: {os.path.join(folder, f'step-{self.step}')}")
        if metrics.enable_tensorboard and self._trained:
            logger.info(f"TensorBoard: {Path(outputs, metrics.save_tb_folder)}")


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (BadSetting, CheckpointError) as error:  # on every rank, wherever it happened
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
        torchtitan.train.main() if JOBS_ARE_FUNCTIONS else torchtitan.train.main(Trainer)
    finally:
        # A process that ends with gloo's threads running is now and then aborted (SIGABRT,
        # "terminate called without an active exception"), whatever it has said before.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # modules live to the end: no collection, the last one least, need look at them
    main()
