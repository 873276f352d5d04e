"""Runs what the study still lacks, several runs at a time, each process one after the other."""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from studies.pretrain.plan import LR, Loss, Study
from studies.pretrain.results import Results, Run

__all__ = ["estimate", "execute"]


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


def estimate(
    study: Study,
    sizes: list[str],
    contestants: list[str],
    stages: list[str],
    results: Results,
    jobs: int,
) -> str:
    """How many runs are missing and how long they will take, from the finished ones if any."""
    text = []
    for size in sizes:
        pretended: dict[str, Run] = {}

        def loss(run: Run, pretended: dict[str, Run] = pretended) -> float | None:
            found = results.loss(run)
            return _distance(study, run) if found is None and run.id in pretended else found

        while more := missing(study, [size], contestants, stages, loss):
            pretended.update(more)
        hours = sum(_seconds(study, run, results) for run in pretended.values()) / 3600
        text.append(f"{size}: {len(pretended)} runs, about {hours / jobs:.1f} h")
    return "; ".join(text) + f" with {jobs} at a time"


def _distance(study: Study, run: Run) -> float:
    """From the middle of the list of lr: as losses they let no list grow."""
    tried = study.contestants[run.contestant]["tune"].get(LR, [run.settings[LR]])
    middle = statistics.median_low(tried)
    return abs(math.log(run.settings[LR] / middle))


def _seconds(study: Study, run: Run, results: Results) -> float:
    steps = run.settings["training.steps"]
    for same in ("contestant", "size"):
        known = [
            record["seconds"][-1] / record["step"][-1]
            for record in results
            if record["size"] == run.size and record[same] == getattr(run, same)
        ]
        if known:
            return float(steps * sum(known) / len(known))
    return float(steps * study.seconds_per_step[run.size])


def execute(
    study: Study,
    sizes: list[str],
    contestants: list[str],
    stages: list[str],
    results: Results,
    jobs: int,
    threads: int,
) -> None:
    """Runs until nothing is missing. Runs that are under way when it is ended go on next time."""
    # Read when torch is imported, which is when a process starts.
    os.environ["OMP_NUM_THREADS"] = str(threads)
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
                _say(run, results)


def _run(run: Run) -> dict[str, Any]:
    from studies.pretrain import job  # in the process that trains

    return job.run(run.settings, Path(run.settings["job.dump_folder"], run.id))


def _say(run: Run, results: Results) -> None:
    record = results[run]
    seconds = record["seconds"][-1]
    print(
        f"{time.strftime('%H:%M:%S')} {run.size} {run.contestant} {run.stage} "
        f"lr {run.settings['optimizer.lr']:g}: {record['step'][-1]} steps, {seconds:.0f} s, "
        f"validation loss {results.loss(run):.4f}",
        flush=True,
    )
