"""Small TorchTitan jobs for tests, run on the CPU inside the calling process."""

import argparse
import contextlib
import inspect
import io
import logging
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import BaseLogger

from shampoo_torchtitan import cpu
from shampoo_torchtitan.demo import BYTE_TOKENIZER
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from shampoo_torchtitan.train import JobReader, Trainer
from tests.models import deterministic_gradients, full_parameters, local_part
from tests.ranks import run_ranks

if JOBS_ARE_FUNCTIONS:
    from tests.shampoo_torchtitan import tiny_moe_03  # noqa: F401  registers it
else:
    from tests.shampoo_torchtitan import tiny_moe_02  # noqa: F401  registers it

# TorchTitan 0.3 needs torch 2.14 for pipelines, and has no tensor parallelism of experts alone.
PIPELINES = not JOBS_ARE_FUNCTIONS or cpu.AT_LEAST_2_14
EXPERT_TENSORS = not JOBS_ARE_FUNCTIONS

on_cpu = pytest.mark.skipif(not cpu.needed(), reason="this machine has an accelerator")

TINY_JOB = """
model.name = "llama3"
model.flavor = "tiny"
model.hf_assets_path = "{tokenizer}"
job.dump_folder = "{folder}"
optimizer.name = "shampoo"
optimizer.lr = 1e-2
optimizer.shampoo.lr_factor = 1
optimizer.shampoo.precondition_frequency = 2
optimizer.shampoo.start_preconditioning_step = 2
lr_scheduler.warmup_steps = 2
training.dataset = "python_source"
training.dataset_path = "{folder}/source"
training.local_batch_size = 2
training.seq_len = 32
training.steps = 4
checkpoint.interval = 100
checkpoint.last_save_model_only = false
metrics.log_freq = 1
debug.seed = 0
"""

TINY_JOB_WITH_DEFAULTS = re.sub(r"optimizer\.shampoo.*\n", "", TINY_JOB.replace("1e-2", "3e-3"))


def write_job(folder: Path, text: str = TINY_JOB) -> Path:
    """Writes a job file, and a few source files that it uses."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    for i in range(40):
        (source / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n" * 20)
    job = folder / "job.toml"
    job.write_text(text.format(folder=folder, tokenizer=BYTE_TOKENIZER))
    return job


def read_job(job: Path, *arguments: str):
    """The JobConfig of a file and further command line arguments, as the launcher reads it."""
    return JobReader().parse_args(["--job.config_file", str(job), *arguments])


def make_trainer(job: Path, *arguments: str) -> Trainer:
    """A Trainer on this rank; RANK, WORLD_SIZE and so on must be set."""
    assert "RANK" in os.environ
    return Trainer(read_job(job, *arguments))


@dataclass
class Outcome:
    """What a rank saw of a job."""

    exit_code: int | None
    """None if it ran to its end."""
    logged: str
    """Log and errors."""
    metrics: list[dict[str, float]]
    """Of the steps that this job made."""
    step: int = -1
    weights: dict[str, torch.Tensor] | None = None
    """All of them, whole, in the end."""
    expert_biases: tuple[torch.Tensor, ...] = ()

    @property
    def losses(self) -> list[float]:
        """Of these steps."""
        return [metrics["loss_metrics/global_avg_loss"] for metrics in self.metrics]


@contextlib.contextmanager
def _logged_lines() -> Iterator[io.StringIO]:
    """Collects what is logged, as text."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield text


def _run(job: Path, arguments: list[str], same_batches: bool) -> Outcome:
    os.environ["LOG_RANK"] = os.environ["RANK"]  # no rank waits for the one that is shown
    outcome = Outcome(None, "", [])
    with (
        mock.patch.object(BaseLogger, "log", lambda self, m, step: outcome.metrics.append(m)),
        mock.patch("time.sleep"),
        _logged_lines() as logged,
        contextlib.redirect_stderr(logged),
    ):
        try:
            trainer = make_trainer(job, *arguments)
            if same_batches:
                give_batches(trainer)
            trainer.train()
            trainer.close()  # without TorchTitan's rest at the end
        except SystemExit as exit:
            outcome.exit_code = exit.code
        else:
            (model,) = trainer.model_parts
            outcome.step, outcome.weights = trainer.step, full_parameters(model)
            buffers = model.named_buffers()
            outcome.expert_biases = tuple(b.clone() for name, b in buffers if "expert_bias" in name)
    outcome.logged = logged.getvalue()
    return outcome


def run(n: int, job: Path, *arguments: str, same_batches: bool = True) -> list[Outcome]:
    """A job on n ranks; by default with batches that depend on the step alone."""
    given = {"arguments": list(arguments), "same_batches": same_batches}
    return run_ranks(n, _run, init=False, timeout=240, job=job, **given)


def give_batches(trainer: Trainer, sequences: int = 8) -> None:
    """Makes a trainer see the same text on every mesh.

    TorchTitan's data loader hands a rank text that depends on the data parallel degree. Here step s
    always trains on the same sequences of real text, which the data parallel ranks share.
    """
    text = "".join(map(inspect.getsource, (argparse, inspect, typing)))
    tokens = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    config = trainer.config if JOBS_ARE_FUNCTIONS else trainer.job_config
    length = config.training.seq_len + 1
    batch = trainer.parallel_dims.get_optional_mesh("batch")
    ranks, rank = (batch.size(), batch.get_local_rank()) if batch else (1, 0)
    mine = slice(rank * sequences // ranks, (rank + 1) * sequences // ranks)

    def batches(dataloader: object) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(trainer.step)
            starts = torch.randint(0, len(tokens) - length, (sequences,), generator=generator)
            taken = torch.stack([tokens[start : start + length] for start in starts])[mine]
            trainer.metrics_processor.ntokens_since_last_log += taken.numel()
            trainer.metrics_processor.data_loading_times.append(0.0)
            yield {"input": taken[:, :-1].contiguous()}, taken[:, 1:].contiguous()

    trainer.batch_generator = batches


def put_weights(parts: list[torch.nn.Module]) -> None:
    """The same on every mesh: TorchTitan draws other weights for each pipeline stage."""
    for part in parts:
        values = deterministic_gradients(part, -1)
        with torch.no_grad():
            for name, p in part.named_parameters():
                value = local_part(values[name], p) if isinstance(p, DTensor) else values[name]
                (p.to_local() if isinstance(p, DTensor) else p).copy_(value)
