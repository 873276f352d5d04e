"""`--cuda` runs the tests of GPUs alone, and says so where there is no GPU."""

import contextlib
import io
import os
from pathlib import Path

import pytest

from tests.ranks import run_ranks


def run_without_a_gpu() -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(Path(__file__).resolve().parents[1])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "--cuda"])
    return said.getvalue()


def test_each_is_skipped_with_the_reason():
    (said,) = run_ranks(1, run_without_a_gpu, init=False, timeout=240)
    assert "no CUDA GPU here" in said and " skipped" in said
    assert " skipped" in said
    assert "passed" not in said and "failed" not in said
