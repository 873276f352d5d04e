"""The ways in which a job of TorchTitan's own launcher comes to Shampoo, each for 20 steps."""

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torchtitan.components.optimizer
import torchtitan.train
from torchtitan.components.metrics import BaseLogger
from torchtitan.config import ConfigManager

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs

pytestmark = jobs.on_cpu

functions = pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.2 has TOML files alone")
files = pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.3 imports nothing for a file")

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
def grouped():
    config, ours = adamw(), {"lr": 3e-3}
    settings = {
        "embeddings|lm_head|norm": ("AdamW", {"lr": 1e-3}),
        "feed_forward": ("Shampoo", {**ours, "weight_decay": 0.0}),
        ".*": ("Shampoo", ours),
    }
    if hasattr(config.optimizer, "param_groups"):
        adam = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        config.optimizer = shampoo(param_groups=[
            ParamGroupConfig(pattern=p, optimizer_name=name, optimizer_kwargs=adam | of)
            for p, (name, of) in settings.items()
        ])
    else:  # from 0.4 on
        from torchtitan.components.optimizer import AdamW, OptimizersContainer
        from shampoo_torchtitan import Shampoo
        kinds = {"AdamW": AdamW, "Shampoo": Shampoo}
        config.optimizer = OptimizersContainer.Config(
            optimizers=[kinds[n].Config(pattern=p, **of) for p, (n, of) in settings.items()]
        )
    return config
"""


def forget_us() -> None:
    """TorchTitan's launcher knows nothing of us."""
    if JOBS_ARE_FUNCTIONS:
        sys.modules["torchtitan.config.override"]._REGISTRY.clear()
    else:
        ours = torchtitan.components.optimizer.build_optimizers
        theirs = sys.modules[ours.__module__]._titan_build_optimizers
        for module in list(sys.modules.values()):
            if vars(module).get("build_optimizers") is ours:
                module.build_optimizers = theirs
    for name in [name for name in sys.modules if name.startswith("shampoo_torchtitan")]:
        del sys.modules[name]


def launched(folder: Path, arguments: list[str]) -> tuple[list[tuple[int, dict]], str]:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    forget_us()
    if not JOBS_ARE_FUNCTIONS:  # it has read the command line when it was imported
        ConfigManager.parse_args.__defaults__ = (arguments,)
    metrics, said = [], io.StringIO()
    with (
        mock.patch.object(BaseLogger, "log", lambda self, m, step: metrics.append((step, m))),
        mock.patch("time.sleep"),
        mock.patch.object(sys, "argv", ["train", *arguments]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        torchtitan.train.main(*[torchtitan.train.Trainer][: not JOBS_ARE_FUNCTIONS])
    return metrics, said.getvalue()


def titan(folder: Path, *arguments: str) -> tuple[list[tuple[int, dict[str, float]]], str]:
    """Steps with their metrics, and the log, of TorchTitan's own launcher."""
    given = {"folder": folder, "arguments": list(arguments)}
    (found,) = run_ranks(1, launched, init=False, timeout=240, **given)
    return found


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


USE = 'shampoo_torchtitan.configs.use_shampoo={"lr": 2e-3, "precondition_frequency": 2}'
JOBS = {
    "with settings of the command line": (
        ["--config=native", "--optimizer.lr=2e-3", "--optimizer.shampoo.precondition-frequency=1"]
    ),
    "of AdamW with an override": ["--config=adamw", "--override.imports", USE],
}


@functions
@pytest.mark.parametrize("job", JOBS)
def test_a_function_of_a_registry(folder, job):
    metrics, log = titan(folder, "--module=registry", *JOBS[job], "--training.steps=4")
    assert "Shampoo preconditions" in log and "'lr': 0.002" in log
    assert metrics[-1][1]["shampoo/root_refreshes"] > 0


@functions
def test_groups_with_their_own_optimizer_lr_and_weight_decay(folder):
    log = trains_and_resumes(folder, "--module=registry", "--config=grouped")
    assert "Optimizer AdamW (model_part=0)" in log and "'lr': 0.001" in log
    assert log.count("Optimizer Shampoo (model_part=0)") == 2 and "'weight_decay': 0.0" in log


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
