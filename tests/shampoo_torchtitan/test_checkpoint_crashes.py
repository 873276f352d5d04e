"""Ranks that are killed at any moment: training goes on from the newest complete checkpoint, as if
nothing had happened. More rounds with --crash-rounds, --crash-saving async."""

import dataclasses
import json
import os
import random
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torchtitan.components.metrics

from shampoo_torchtitan.checkpoint import complete_checkpoints
from tests.ranks import RanksError, run_ranks
from tests.shampoo_torchtitan import jobs

pytestmark = jobs.on_cpu

INTERVAL = 3


@dataclasses.dataclass(frozen=True)
class Crash:
    """When and where SIGKILL strikes."""

    ranks: tuple[int, ...]
    moment: str
    """A "step", or a "save"."""
    step: int
    delay: float
    """Seconds after the step or save has begun."""


def doomed(job: Path, arguments: list[str], losses: Path, crash: Crash | None) -> None:
    """Train, write the loss of each step to a file, and be killed."""
    rank = int(os.environ["RANK"])
    trainer = jobs.make_trainer(job, *arguments)
    jobs.give_batches(trainer)

    def killed_later(step: int, moment: str) -> None:
        if crash and (moment, step) == (crash.moment, crash.step) and rank in crash.ranks:
            threading.Timer(crash.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def log(logger: Any, metrics: dict[str, float], step: int) -> None:
        if rank == 0:
            with losses.open("a") as file:
                print(json.dumps([step, metrics["loss_metrics/global_avg_loss"]]), file=file)

    train_step, save = trainer.train_step, trainer.checkpointer.save

    def train_step_killed_later(*args: Any) -> None:
        killed_later(trainer.step, "step")
        train_step(*args)

    def save_killed_later(step: int, *args: Any, **kwargs: Any) -> None:
        killed_later(step, "save")
        save(step, *args, **kwargs)

    trainer.train_step, trainer.checkpointer.save = train_step_killed_later, save_killed_later
    base = torchtitan.components.metrics.BaseLogger
    with mock.patch.object(base, "log", log), mock.patch("time.sleep"):
        trainer.train()
    trainer.close()


def read(losses: Path) -> list[tuple[int, float]]:
    lines = losses.read_text().splitlines() if losses.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def test_training_survives_crashes_at_random_moments(tmp_path, request):
    rounds = request.config.getoption("--crash-rounds")
    saving = request.config.getoption("--crash-saving")
    end = 3 * rounds + 6
    job = jobs.write_job(tmp_path)
    common = [f"--training.steps={end}", "--checkpoint.enable", "--checkpoint.keep_latest_k=2"]
    common += [f"--checkpoint.interval={INTERVAL}"]

    def go(name: str, mode: str, crash: Crash | None) -> list[tuple[int, float]]:
        losses = tmp_path / f"{name}.jsonl"
        before = len(read(losses))
        arguments = [*common, f"--checkpoint.folder={name}", f"--checkpoint.async_mode={mode}"]
        keywords = {"job": job, "arguments": arguments, "losses": losses, "crash": crash}
        try:
            run_ranks(2, doomed, init=False, timeout=240 + 20 * rounds, **keywords)
        except RanksError as error:
            assert crash and "died with exit code -9" in str(error)
            killed.append(name)
        return read(losses)[before:]

    killed = list[str]()
    expected = dict(go("at_once", "disabled", None))
    rng = random.Random(0)
    seen: dict[int, set[float]] = defaultdict(set)
    crashes = []
    for number in range(rounds + 1):
        complete = complete_checkpoints(tmp_path / "killed")
        unfinished = len(list((tmp_path / "killed").glob("step-*"))) - len(complete)
        newest = int(complete[-1].removeprefix("step-")) if complete else 0
        crash = None
        if number < rounds:
            moment = ("save", "step")[number % 2]
            step = rng.randint(newest + 1, min(newest + 5, end - 1))
            if moment == "save":
                step = newest + INTERVAL
            ranks = rng.choice([(0,), (1,), (0, 1)])
            crash = Crash(ranks, moment, step, rng.uniform(0.0, 0.6))
        found = go("killed", saving or rng.choice(["disabled", "async"]), crash)
        crashes.append((crash, newest, unfinished, [step for step, _ in found]))
        assert not found or found[0][0] == newest + 1, crashes
        for step, loss in found:
            seen[step].add(loss)
    assert {step: {loss} for step, loss in expected.items()} == seen, crashes
    assert sorted(seen) == list(range(1, end + 1))
    # (A job may be over before the signal comes.)
    assert len(killed) > rounds / 2, crashes
