"""Run an example on several ranks, as its users do, and read what it prints."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

__all__ = ["half_way", "losses", "torchrun"]

_ROOT = Path(__file__).resolve().parents[2]


def torchrun(script: str, ranks: int, *arguments: str) -> str:
    """What the script prints; `script` is a path from the root of the repository.

    Raises:
        RuntimeError: it failed; has all that it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), __file__, script, *arguments]
    folders = [str(_ROOT), str(_ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if sys.platform == "linux":
        # Gloo looks the host's own name up otherwise, which not every machine can answer.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} on {ranks} ranks failed:\n{done.stdout}\n{done.stderr}")
    if "exclude = [" in done.stderr:
        raise RuntimeError(f"of this ordinary model names are doubted:\n{done.stderr}")
    return done.stdout


def losses(text: str) -> list[float]:
    """Of the lines like "step 10: loss 3.21", in their order."""
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", text, re.MULTILINE)]


def half_way(losses: list[float]) -> float:
    """Between the first and the last: a run that has not been resumed begins above it. (Single
    batches differ by more than what one more step changes.)"""
    return (losses[0] + losses[-1]) / 2


def _run_on_this_rank(script: str) -> None:
    """Run the script, and end without the interpreter's clean-up.

    There a thread of gloo that has yet to free its last tensor aborts the process, now and then
    (github.com/pytorch/pytorch/pull/179291), also after destroy_process_group(): DTensors and DDP
    keep the group alive.
    """
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]  # the script finds its own arguments
    _run_on_this_rank(sys.argv[0])
