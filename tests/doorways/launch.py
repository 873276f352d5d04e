"""Run an example on several ranks, as its users do with torchrun, and read what it prints."""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path

from tests.ranks import run_ranks

__all__ = ["half_way", "losses", "torchrun"]

_ROOT = Path(__file__).resolve().parents[2]


def torchrun(script: str, ranks: int, *arguments: str) -> str:
    """What the script prints; `script` is a path from the root of the repository.

    Raises:
        RanksError: It failed on a rank.
    """
    said = "".join(run_ranks(ranks, _run, init=False, timeout=240, command=[script, *arguments]))
    assert "exclude = [" not in said, f"of this ordinary model names are doubted:\n{said}"
    return said


def _run(command: list[str]) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(_ROOT)
    sys.argv = command
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        runpy.run_path(command[0], run_name="__main__")
    return said.getvalue()


def losses(text: str) -> list[float]:
    """Of the lines like "step 10: loss 3.21", in their order."""
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", text, re.MULTILINE)]


def half_way(losses: list[float]) -> float:
    """Between the first and the last: a run that has not been resumed begins above it. (Single
    batches differ by more than what one more step changes.)"""
    return (losses[0] + losses[-1]) / 2
