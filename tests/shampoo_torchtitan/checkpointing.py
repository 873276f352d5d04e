"""Jobs that save, load and are refused, for the tests of checkpoints."""

import contextlib
import dataclasses
import io
import logging
import os
from pathlib import Path
from unittest import mock

import torchtitan.components.metrics

from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs


@dataclasses.dataclass
class Outcome:
    """What a rank saw of a job."""

    exit_code: int | None
    """None if it ran to its end."""
    step: int
    losses: list[float]
    """Of the steps that this job made."""
    logged: str
    """Log and errors."""


@contextlib.contextmanager
def logged_lines():
    """Collects what is logged, as text."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _job(job: Path, arguments: list[str]) -> Outcome:
    os.environ["LOG_RANK"] = os.environ["RANK"]  # no rank waits for the one that is shown
    metrics: list[dict[str, float]] = []
    exit_code, step = None, -1
    base = torchtitan.components.metrics.BaseLogger
    with (
        mock.patch.object(base, "log", lambda self, m, step: metrics.append(m)),
        logged_lines() as logged,
        contextlib.redirect_stderr(logged),
    ):
        try:
            step = jobs.train(job, *arguments, same_batches=True).step
        except SystemExit as exit:
            exit_code = exit.code
    losses = [m["loss_metrics/global_avg_loss"] for m in metrics]
    return Outcome(exit_code, step, losses, logged.getvalue())


def run(n: int, job: Path, *arguments: str) -> list[Outcome]:
    """A job on n ranks, with batches that depend on the step alone."""
    return run_ranks(n, _job, init=False, timeout=240, job=job, arguments=list(arguments))
