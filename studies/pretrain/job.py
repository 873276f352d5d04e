"""One run of the study: a TorchTitan job, trained in this process, and the record of it."""

import contextlib
import io
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # or the first step of a process would import it, and be slow
import torch.distributed as dist

from shampoo_torchtitan.demo import BYTE_TOKENIZER
from shampoo_torchtitan.train import JobReader, Trainer
from studies.pretrain import data
from studies.pretrain.results import versions
from studies.pretrain.toml_files import toml_text

_TOKENIZER = "./outputs/byte_tokenizer"  # what it is called in the records
_TRAINING_TOKENS = 40_000_000  # at most: large data sets are not read to their end
_HELD_OUT_TOKENS = 500_000
_CHECKPOINTS = {  # after each validation: the last step gets none, as the run is over
    "checkpoint.enable": True,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 2,
}
_HOPELESS = 20.0  # nats; no run comes back from there
_VERSIONS = versions()  # of the code that this process has read, whatever is there when a run ends


class StudyTrainer(Trainer):
    """TorchTitan's Trainer on batches that depend on the seed and the step alone.

    Validation is on the same text each time. Training is timed without it and without start-up.
    With checkpoints on, there is one after each validation, and `curve` begins at the last.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        training, validation = config.training, config.validation
        folder = config.model.hf_assets_path
        text = data.tokens(training.dataset, training.dataset_path, folder, _TRAINING_TOKENS)
        batches = data.batches(text, training.local_batch_size, training.seq_len, config.debug.seed)
        self.batches = self.batch_generator(batches)
        text = data.tokens(validation.dataset, validation.dataset_path, folder, _HELD_OUT_TOKENS)
        self._held_out = data.held_out(
            text, validation.local_batch_size, validation.seq_len, validation.steps
        )
        self.optimizers.step = self._timed(self.optimizers.step)
        self._training_losses: list[torch.Tensor] = []
        self._curve: dict[str, Any] = {
            **{name: [] for name in ("step", "loss", "training_loss", "seconds", "cpu_seconds")},
            "optimizer_seconds": 0.0,
        }

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**batch)
        self._training_losses.append(loss.detach())
        return loss

    def curve(self) -> dict[str, Any]:
        """Trains; the losses (nats per token) and the seconds so far at each validation."""
        freq = self.job_config.validation.freq
        self.checkpointer.load()
        for _ in range(self.step):
            next(self.batches)
        curve = self._curve
        wall, cpu = (curve[name][-1] if self.step else 0.0 for name in ("seconds", "cpu_seconds"))
        while self.should_continue_training():
            self.step += 1
            self.gc_handler.run(self.step)
            started = time.perf_counter(), time.process_time()
            self.train_step(self.batches)
            wall += time.perf_counter() - started[0]
            cpu += time.process_time() - started[1]
            if self.step % freq == 0 or not self.should_continue_training():
                loss = self._validation_loss()
                curve["step"].append(self.step)
                curve["loss"].append(round(loss, 4) if loss < _HOPELESS else math.inf)
                training = torch.stack(self._training_losses).mean().item()
                curve["training_loss"].append(round(training, 4))
                self._training_losses.clear()
                curve["seconds"].append(round(wall, 3))
                curve["cpu_seconds"].append(round(cpu, 3))
                if not loss < _HOPELESS:
                    break
                self.checkpointer.save(self.step)
        return {**curve, "optimizer_seconds": round(curve["optimizer_seconds"], 3)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "curve": self._curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._curve = state_dict["curve"]

    @torch.no_grad()
    def _validation_loss(self) -> float:
        (model,) = self.model_parts
        model.eval()
        total, n = 0.0, 0
        for inputs, labels in self._held_out:
            with self.maybe_enable_amp:
                prediction = model(inputs["input"].to(self.device))
                total += self.loss_fn(prediction, labels.to(self.device)).item()
            n += labels.numel()
        model.train()
        return total / n

    def _timed(self, step: Any) -> Any:
        def timed_step(*args: Any, **kwargs: Any) -> None:
            started = time.process_time()
            step(*args, **kwargs)
            self._curve["optimizer_seconds"] += time.process_time() - started

        return timed_step


def run(settings: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Trains the job that the settings describe.

    Args:
        settings: The job's TOML file with dots in the names: {"optimizer.lr": 1e-3, ...}.
        folder: For checkpoints, from which a run that was killed goes on; it is deleted at the end
            of the run. None: it has none.

    Returns:
        What `StudyTrainer.curve` returns, how long the start took in seconds, the device, and the
        versions of the code.
    """
    started = time.perf_counter()
    if folder is not None:
        settings = {**settings, **_CHECKPOINTS, "job.dump_folder": str(folder.absolute())}
    with trainer_of(settings) as trainer:
        start = time.perf_counter() - started
        curve = trainer.curve()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        **curve,
        "start_seconds": round(start, 3),
        "device": trainer.device.type,
        "versions": _VERSIONS,
    }


@contextlib.contextmanager
def trainer_of(settings: dict[str, Any]) -> Iterator[StudyTrainer]:
    """The trainer of a job, which is closed afterwards."""
    with tempfile.TemporaryDirectory() as temporary, _one_process(), _quiet():
        job = Path(temporary, "job.toml")
        # The studies' lr are the step's own.
        job.write_text(toml_text({"optimizer.shampoo.lr_factor": 1.0, **settings}))
        config = JobReader().parse_args(["--job.config_file", str(job)])
        # The launcher's own choice on CPUs is fp32, for all CPUs.
        precision = settings.get("training.mixed_precision_param", "float32")
        config.training.mixed_precision_param = precision
        if config.model.hf_assets_path == _TOKENIZER:
            config.model.hf_assets_path = str(BYTE_TOKENIZER)
        trainer = StudyTrainer(config)
        try:
            yield trainer
        finally:
            trainer.close()


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """This process is the only rank; afterwards it is none, as before."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = dict(zip(names, ("0", "0", "1", "127.0.0.1", "0"), strict=True))
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with mock.patch.dict(os.environ, alone, GLOO_SOCKET_IFNAME=interface):
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


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
