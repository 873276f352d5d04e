"""`--cuda` runs the tests of GPUs alone, and says so where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def collected(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    return run.stdout


def test_without_a_gpu_each_is_skipped_with_the_reason():
    said = collected("--cuda")
    assert "no CUDA GPU here" in said
    assert "skipped in" in said and "passed" not in said and "failed" not in said


def test_without_the_option_none_is_collected():
    assert "no tests ran" in collected("tests/cuda")
