"""Jobs of a checkout of TorchTitan's main (August 2026, b5bcd76c), which `TITAN=main` asks for."""

import importlib.util
import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest

if not importlib.util.find_spec("torchtitan.components.data"):
    pytest.skip("needs TorchTitan's main of August 2026", allow_module_level=True)

from torchtitan.components.metrics import BaseLogger

from shampoo_torchtitan.plan import main
from shampoo_torchtitan.train import JobReader, Trainer
from tests.ranks import run_ranks

REGISTRY = "--module=tests.shampoo_torchtitan.registry_main"


def job(arguments: list[str], text: str) -> list[float]:
    """The losses of the steps of a job."""
    os.environ["TEXT_OF_THE_TEST"] = f"{text}.{os.environ['RANK']}"
    losses: list[float] = []
    log = lambda self, m, step: losses.append(m["loss_metrics/global_avg_loss"])  # noqa: E731
    trainer = Trainer(JobReader().parse_args([REGISTRY, *arguments]))
    with mock.patch.object(BaseLogger, "log", log), mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    return losses


def run(folder: Path, n: int, config: str, steps: int, *more: str) -> list[float]:
    arguments = [f"--config={config}", f"--dump_folder={folder}", f"--training.steps={steps}"]
    arguments += ["--checkpoint.exclude_from_loading=dataloader", *more]
    given = {"arguments": arguments, "text": str(folder / "text")}
    return run_ranks(n, job, init=False, timeout=900, **given)[0]


def test_it_trains_and_goes_on_on_another_mesh_and_with_adamw_and_back(tmp_path):
    losses = run(tmp_path, 2, "kl_shampoo", 4)
    losses += run(tmp_path, 1, "kl_shampoo", 6)
    losses += run(tmp_path, 2, "adamw", 8)
    losses += run(tmp_path, 2, "kl_shampoo", 10)
    # As many as steps: each goes on where the last one was.
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.3


def test_a_plan_and_a_wrong_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXT_OF_THE_TEST", str(tmp_path / "text"))
    arguments = [REGISTRY, "--config=kl_shampoo", "--world-size=8", "--json"]
    assert main([*arguments, "--optimizer.shampoo.precondition-frequency=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["settings"]["precondition_frequency"]) == (8, 5)
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--optimizer.lr=-1.0"])
    assert refused.value.code == 2
    assert "'lr' is -1.0; allowed: a finite number >= 0" in capsys.readouterr().err
