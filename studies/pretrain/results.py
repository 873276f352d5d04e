"""Runs, which their settings identify, and the file of their records: one JSON line each."""

import dataclasses
import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import shampoo_fsdp

_CHANGE_NOTHING = ("job.description", "job.dump_folder", "metrics.log_freq")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    size: str
    contestant: str
    stage: str
    """What it is for first; another stage may use it too."""
    settings: dict[str, Any]
    """The job's TOML file, with dots in the names."""

    @property
    def id(self) -> str:
        """Equal for runs that train the same."""
        settings = {k: v for k, v in self.settings.items() if k not in _CHANGE_NOTHING}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Results:
    """The records of finished runs, by their id; each is on disk as soon as it is added.

    A line that a killed study left half written is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self._records[record["id"]] = record

    def __contains__(self, run: Run) -> bool:
        return run.id in self._records

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self._records[run.id]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records.values())

    def loss(self, run: Run) -> float | None:
        """The last validation loss; infinite if the run diverged, None if there is none yet."""
        if run not in self:
            return None
        loss = self[run]["loss"][-1]
        return math.inf if loss is None else float(loss)

    def add(self, run: Run, curve: dict[str, Any]) -> None:
        """Appends a finished run."""
        curve = {**curve, "loss": [x if math.isfinite(x) else None for x in curve["loss"]]}
        record = {"id": run.id, **dataclasses.asdict(run), **curve}
        self._records[run.id] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, separators=(",", ":"))
        with self.path.open("a+") as file:
            # After a half line, which has no end.
            file.seek(max(0, file.tell() - 1))
            file.write(text + "\n" if file.read(1) in ("", "\n") else "\n" + text + "\n")

    def tell(self, run: Run) -> None:
        """Print that a run has finished."""
        lr, now = run.settings.get("optimizer.lr", ""), time.strftime("%H:%M:%S")
        name = f"{run.size}, {run.contestant}, {run.stage}, {lr}"
        print(f"{now} {name}: validation loss {self.loss(run):.4f}", flush=True)


def complete(
    runs: Iterable[Run], results: Results, train: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Train what has no result yet, one after the other."""
    for run in runs:
        if run not in results:
            results.add(run, train(run.settings))
            results.tell(run)


def versions() -> dict[str, str]:
    """Of what decides the result, and of the machine, which decides the time."""
    found = {name: metadata.version(name) for name in ("torch", "torchtitan")}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        **found,
        "shampoo_fsdp": shampoo_fsdp.__version__,
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {_processor()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
