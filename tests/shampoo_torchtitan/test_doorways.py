"""The ways in which a job of TorchTitan's own launcher comes to Shampoo, each for 20 steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.shampoo_torchtitan import jobs

pytestmark = jobs.on_cpu

functions = pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.2 has TOML files alone")
files = pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.3 imports nothing for a file")

# What `python -m torchtitan.train` does, on a CPU; losses go to the first argument.
_TITAN = """
import json, sys
from unittest import mock
from shampoo_torchtitan import cpu
file = sys.argv.pop(1)
cpu.enable()
import torchtitan.train
from torchtitan.components.metrics import BaseLogger
for name in [name for name in sys.modules if name.startswith("shampoo_torchtitan")]:
    del sys.modules[name]  # TorchTitan's launcher knows nothing of us
metrics = []
logging = mock.patch.object(BaseLogger, "log", lambda self, m, step: metrics.append((step, m)))
with logging, mock.patch("time.sleep"):
    torchtitan.train.main(*[torchtitan.train.Trainer][: MAIN_TAKES_A_TRAINER])
with open(file, "w") as out:
    json.dump(metrics, out)
"""

# A user's own registry.
_REGISTRY = """
from torchtitan.components.optimizer import ParamGroupConfig, default_adamw
from shampoo_torchtitan import toml
from shampoo_torchtitan.configs import shampoo
from shampoo_torchtitan.generation import titan

def adamw():
    config = toml.read("job.toml", {"optimizer.name": "AdamW"})
    config.optimizer = default_adamw(lr=3e-3)
    titan().fit_to_cpu(config)
    return config

def native():
    config = adamw()
    config.optimizer = shampoo(lr=3e-3, precondition_frequency=2)
    return config

def listed():
    from torchtitan.components.optimizer import AdamW, OptimizersContainer
    from shampoo_torchtitan import Shampoo

    config = adamw()
    config.optimizer = OptimizersContainer.Config(
        optimizers=[
            AdamW.Config(pattern="embeddings|lm_head|norm", lr=1e-3),
            Shampoo.Config(pattern="feed_forward", lr=3e-3, weight_decay=0.0),
            Shampoo.Config(pattern=".*", lr=3e-3),
        ]
    )
    return config

def grouped():
    if not hasattr(default_adamw(), "param_groups"):
        return listed()  # from 0.4 on
    config = adamw()
    kwargs = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    config.optimizer = shampoo(
        param_groups=[
            ParamGroupConfig(pattern="embeddings|lm_head|norm", optimizer_name="AdamW",
                             optimizer_kwargs={**kwargs, "lr": 1e-3}),
            ParamGroupConfig(pattern="feed_forward", optimizer_name="Shampoo",
                             optimizer_kwargs={**kwargs, "weight_decay": 0.0}),
            ParamGroupConfig(pattern=".*", optimizer_name="Shampoo", optimizer_kwargs=kwargs),
        ]
    )
    return config
"""


def titan(folder: Path, *arguments: str) -> tuple[list[tuple[int, dict[str, float]]], str]:
    """Steps with their metrics, and the log, of TorchTitan's own launcher."""
    code = _TITAN.replace("MAIN_TAKES_A_TRAINER", str(int(not JOBS_ARE_FUNCTIONS)))
    environment = os.environ | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"},
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(folder)]),
    }
    command = [sys.executable, "-c", code, "metrics.json", *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "metrics.json").read_text()), run.stdout + run.stderr


def trains_and_resumes(folder: Path, *arguments: str) -> str:
    saved = [*arguments, "--checkpoint.enable", "--checkpoint.interval=10"]
    first, log = titan(folder, *saved, "--training.steps=10")
    then, _ = titan(folder, *saved, "--training.steps=20")
    losses = [metrics["loss_metrics/global_avg_loss"] for _, metrics in [*first, *then]]
    assert [step for step, _ in [*first, *then]] == list(range(1, 21))
    assert sum(losses[15:]) < sum(losses[5:10]) < 5 * (losses[0] - 1.0)
    assert all("shampoo/root_refreshes" in metrics for _, metrics in [*first, *then])
    return log


@pytest.fixture
def folder(tmp_path):
    jobs.write_job(tmp_path)
    (tmp_path / "registry.py").write_text(_REGISTRY)
    return tmp_path


@files
def test_a_job_file_of_02_that_imports_us(folder):
    doors = {"experimental": "custom_import", "job": "custom_config_module"}
    ours = {"experimental": "shampoo_torchtitan", "job": "shampoo_torchtitan.job_config"}
    arguments = [f"--{table}.{key}={ours[table]}" for table, key in doors.items()]
    forced = ["--training.mixed_precision_param=float32", "--activation_checkpoint.mode=none"]
    forced += ["--comm.trace_buf_size=0", "--optimizer.lr=3e-3"]
    log = trains_and_resumes(folder, "--job.config_file=job.toml", *arguments, *forced)
    assert "Shampoo preconditions" in log


@functions
def test_a_function_of_a_registry_with_settings_of_the_command_line(folder):
    arguments = ["--module=registry", "--config=native", "--training.steps=2"]
    arguments += ["--optimizer.lr=1e-4", "--optimizer.shampoo.precondition-frequency=1"]
    metrics, log = titan(folder, *arguments)
    assert "Shampoo preconditions" in log and "'lr': 0.0001" in log
    assert metrics[-1][1]["shampoo/root_refreshes"] > 0


@functions
def test_groups_with_their_own_optimizer_lr_and_weight_decay(folder):
    log = trains_and_resumes(folder, "--module=registry", "--config=grouped")
    assert "Optimizer AdamW (model_part=0)" in log and "'lr': 0.001" in log
    assert log.count("Optimizer Shampoo (model_part=0)") == 2 and "'weight_decay': 0.0" in log


@functions
def test_an_override_of_a_job_of_adamw(folder):
    override = 'shampoo_torchtitan.configs.use_shampoo={"lr": 2e-3, "precondition_frequency": 2}'
    arguments = ["--module=registry", "--config=adamw", "--override.imports", override]
    metrics, log = titan(folder, *arguments, "--training.steps=4")
    assert "'lr': 0.002" in log
    assert metrics[-1][1]["shampoo/root_refreshes"] > 0


@functions
def test_a_file_by_its_module(folder):
    """Read by TorchTitan's launcher; without a GPU its attention does not train."""
    from torchtitan.config import ConfigManager

    from shampoo_torchtitan.configs import ShampooOptimizers

    arguments = ["--module=shampoo_torchtitan.toml", f"--config={folder}/job.toml"]
    config = ConfigManager().parse_args([*arguments, "--optimizer.shampoo.beta3=0.5"])
    assert isinstance(config.optimizer, ShampooOptimizers.Config)
    assert (config.optimizer.lr, config.optimizer.shampoo.beta3) == (1e-2, 0.5)
    assert config.optimizer.shampoo.precondition_frequency == 2
    assert config.dataloader.dataset == "python_source"
