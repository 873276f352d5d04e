"""One run of the study: a TorchTitan job, trained in this process, and the record of it."""

import contextlib
import io
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # or the first step of a process would import it, and be slow
import torch.distributed as dist

from shampoo_torchtitan.train import JobReader, Trainer
from studies.pretrain import data
from studies.pretrain.results import versions
from studies.pretrain.toml_files import toml_text

__all__ = ["run"]

_TRAINING_TOKENS = 4_000_000  # at most: several times what these runs need
_HELD_OUT_TOKENS = 500_000
_HOPELESS = 20.0  # nats; no run comes back from there
_VERSIONS = versions()  # of the code that this process has read, whatever is there when a run ends


class StudyTrainer(Trainer):
    """TorchTitan's Trainer on batches that depend on the seed and the step alone.

    Validation is on the same text each time. Training is timed without it and without start-up.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        training, validation = config.training, config.validation
        folder = config.model.hf_assets_path
        text = data.tokens(training.dataset, training.dataset_path, folder, _TRAINING_TOKENS)
        batches = data.batches(text, training.local_batch_size, training.seq_len, config.debug.seed)
        self._batches = self.batch_generator(batches)
        text = data.tokens(validation.dataset, validation.dataset_path, folder, _HELD_OUT_TOKENS)
        self._held_out = data.held_out(
            text, validation.local_batch_size, validation.seq_len, validation.steps
        )
        self._optimizer_seconds = 0.0
        self.optimizers.step = self._timed(self.optimizers.step)
        self._training_losses: list[torch.Tensor] = []

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**batch)
        self._training_losses.append(loss.detach())
        return loss

    def curve(self) -> dict[str, Any]:
        """Trains; the losses (nats per token) and the seconds so far at each validation."""
        freq = self.job_config.validation.freq
        steps, losses, training, seconds, cpu_seconds = [], [], [], [], []
        wall = cpu = 0.0
        while self.should_continue_training():
            self.step += 1
            self.gc_handler.run(self.step)
            started = time.perf_counter(), time.process_time()
            self.train_step(self._batches)
            wall += time.perf_counter() - started[0]
            cpu += time.process_time() - started[1]
            if self.step % freq == 0 or not self.should_continue_training():
                steps.append(self.step)
                losses.append(round(self._validation_loss(), 4))
                training.append(round(torch.stack(self._training_losses).mean().item(), 4))
                self._training_losses.clear()
                seconds.append(round(wall, 3))
                cpu_seconds.append(round(cpu, 3))
                if not losses[-1] < _HOPELESS:
                    losses[-1] = math.inf
                    break
        return {
            "step": steps,
            "loss": losses,
            "training_loss": training,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "optimizer_seconds": round(self._optimizer_seconds, 3),
        }

    @torch.no_grad()
    def _validation_loss(self) -> float:
        (model,) = self.model_parts
        model.eval()
        total, n = 0.0, 0
        for inputs, labels in self._held_out:
            prediction = model(inputs["input"].to(self.device))
            total += self.loss_fn(prediction, labels.to(self.device)).item()
            n += labels.numel()
        model.train()
        return total / n

    def _timed(self, step: Any) -> Any:
        def timed_step(*args: Any, **kwargs: Any) -> None:
            started = time.process_time()
            step(*args, **kwargs)
            self._optimizer_seconds += time.process_time() - started

        return timed_step


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the job that the settings describe.

    Args:
        settings: The job's TOML file with dots in the names: {"optimizer.lr": 1e-3, ...}.

    Returns:
        What `StudyTrainer.curve` returns, how long the start took in seconds, the device, and the
        versions of the code.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _one_process(), _quiet():
        job = Path(folder, "job.toml")
        job.write_text(toml_text(settings))
        trainer = StudyTrainer(JobReader().parse_args(["--job.config_file", str(job)]))
        start = time.perf_counter() - started
        try:
            curve = trainer.curve()
        finally:
            trainer.close()
    return {
        **curve,
        "start_seconds": round(start, 3),
        "device": trainer.device.type,
        "versions": _VERSIONS,
    }


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """This process is the only rank; afterwards it is none, as before."""
    before = dict(os.environ)
    os.environ.update(
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TorchTitan tells in every run, which would hide the study's progress."""
    logger = logging.getLogger()  # TorchTitan's
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
