"""Runs what the study still lacks, several runs at a time, each process one after the other."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from studies.pretrain.plan import Loss, Study
from studies.pretrain.results import Results, Run


def missing(
    study: Study,
    sizes: Iterable[str],
    contestants: Iterable[str],
    stages: Iterable[str],
    loss: Loss,
) -> dict[str, Run]:
    """The runs that are known by now and have no result, by their id, size after size."""
    runs = [
        run
        for size in sizes
        for contestant in contestants
        for run in study.runs(size, contestant, stages, loss)
    ]
    return {run.id: run for run in runs if loss(run) is None}


def execute(
    study: Study,
    sizes: list[str],
    contestants: list[str],
    stages: list[str],
    results: Results,
    jobs: int,
) -> None:
    """Runs until nothing is missing. Runs that are under way when it is ended go on next time."""
    # Read when torch is imported, which is when a process starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    running: dict[Future[dict[str, Any]], Run] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            waiting = missing(study, sizes, contestants, stages, results.loss)
            under_way = {run.id for run in running.values()}
            for run in [run for run in waiting.values() if run.id not in under_way]:
                if len(running) < jobs:
                    running[pool.submit(_run, run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                results.add(run, future.result())
                results.tell(run)


def _run(run: Run) -> dict[str, Any]:
    from studies.pretrain import job  # in the process that trains

    return job.run(run.settings, Path(run.settings["job.dump_folder"], run.id))
