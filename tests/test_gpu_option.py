"""`--cuda` runs the tests of GPUs alone, and says so where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def test_without_a_gpu_each_is_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--cuda"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert "no CUDA GPU here" in run.stdout
    assert "skipped in" in run.stdout
    assert "passed" not in run.stdout and "failed" not in run.stdout
