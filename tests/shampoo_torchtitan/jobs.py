"""Small TorchTitan jobs for tests, run on the CPU inside the calling process."""

import os
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from shampoo_torchtitan.byte_tokenizer import write_byte_tokenizer
from shampoo_torchtitan.train import JobReader, Trainer

TINY_JOB = """
[model]
name = "llama3"
flavor = "tiny"
hf_assets_path = "{folder}/tokenizer"

[job]
dump_folder = "{folder}"

[optimizer]
name = "shampoo"
lr = 1e-2

[optimizer.shampoo]
precondition_frequency = 2
start_preconditioning_step = 2

[lr_scheduler]
warmup_steps = 2

[training]
dataset = "python_source"
dataset_path = "{folder}/source"
local_batch_size = 2
seq_len = 32
steps = 4

[checkpoint]
interval = 100
last_save_model_only = false

[metrics]
log_freq = 1

[debug]
seed = 0
"""


def write_job(folder: Path, text: str = TINY_JOB) -> Path:
    """Writes a job file, the tokenizer and a few source files that it uses."""
    write_byte_tokenizer(folder / "tokenizer")
    source = folder / "source"
    source.mkdir(exist_ok=True)
    for i in range(40):
        (source / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n" * 20)
    job = folder / "job.toml"
    job.write_text(text.format(folder=folder))
    return job


def read_job(job: Path, *arguments: str):
    """The JobConfig of a file and further command line arguments, as the launcher reads it."""
    return JobReader().parse_args(["--job.config_file", str(job), *arguments])


def make_trainer(job: Path, *arguments: str) -> Trainer:
    """A Trainer on this rank; RANK, WORLD_SIZE and so on must be set."""
    assert "RANK" in os.environ
    return Trainer(read_job(job, *arguments))


def train(job: Path, *arguments: str) -> Trainer:
    """Trains on this rank and closes the job, without TorchTitan's rest at the end."""
    trainer = make_trainer(job, *arguments)
    with mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights, whole."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model_parts[0].named_parameters()
    }
