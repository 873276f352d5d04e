"""TorchTitan's training, with Shampoo known, on GPUs or on the CPU.

torchrun --nproc_per_node 2 -m shampoo_torchtitan.train --job.config_file my.toml

Of `demo` it uses the tokenizer where the job names that one, and `cpu` where there is no GPU.
"""

import contextlib
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shampoo_torchtitan.demo import cpu

_collects = gc.isenabled()
gc.disable()  # there is nothing to collect while modules are read; looking takes a second
try:
    if cpu.needed():
        cpu.enable()  # first: TorchTitan reads the device when it is imported

    import torchtitan.train
    from torchtitan.tools.logging import logger

    from shampoo_torchtitan.container import JobError
    from shampoo_torchtitan.generation import titan

    _titan = titan()
finally:
    if _collects:
        gc.enable()

_titan.register()

__all__ = ["JobReader", "Trainer", "check_degrees", "main"]

_BAD_SETTING = 2  # exit code, that of argparse; launch.py knows it


class JobReader(_titan.Reader):  # type: ignore[name-defined,misc]
    """Reads a job as TorchTitan does, with our settings in it even if it does not ask for them."""

    def parse_args(self, args: list[str] | None = None) -> Any:
        """Reads the job, or ends the process with one readable message."""
        try:
            config = super().parse_args(sys.argv[1:] if args is None else args)
            changes = _titan.fit_to_cpu(config) if cpu.needed() else []
            check_degrees(config, int(os.environ.get("WORLD_SIZE", "1")))
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
        return _titan.with_trainer(config, Trainer)


def check_degrees(config: Any, ranks: int) -> None:
    """Checks that the parallelism's degrees make as many ranks as there are.

    Raises:
        ValueError: It names the degrees and the number of ranks.
    """
    parallelism = config.parallelism
    names = (
        "data_parallel_replicate_degree",
        "data_parallel_shard_degree",
        "context_parallel_degree",
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
    )
    degrees = {name: int(getattr(parallelism, name)) for name in names}
    rest = degrees["data_parallel_shard_degree"] == -1  # whatever the others leave
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if product < 1 or (ranks % product if rest else ranks != product):
        shown = ", ".join(f"{name} = {n}" for name, n in degrees.items() if n not in (-1, 1))
        raise ValueError(
            f"[parallelism] {shown or 'data_parallel_shard_degree = 1'}: the degrees multiply to "
            f"{product}, which must {'divide' if rest else 'be'} the number of ranks, {ranks}"
        )


class Trainer(torchtitan.train.Trainer):  # type: ignore[misc]
    """TorchTitan's Trainer; says at the end where the results are."""

    def __init__(self, config: Any) -> None:
        init = cpu.mesh_independent_init() if cpu.needed() else contextlib.nullcontext()
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
        if dist.get_rank() == 0:
            self._say_where()

    def _say_where(self) -> None:
        config, outputs = self._job, _titan.dump_folder(self._job)
        checkpoint, metrics = config.checkpoint, config.metrics
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
    gc.freeze()  # modules live to the end: no collection, the last one least, need look at them
    main()
