"""examples/fsdp2.py: it trains, and goes on from a checkpoint on another number of ranks."""

from pathlib import Path

import pytest

from tests.doorways.launch import losses, torchrun

_SCRIPT = "examples/fsdp2.py"


def test_it_trains_and_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    whole = losses(torchrun(_SCRIPT, 1, "--steps", "40", "--folder", str(tmp_path / "whole")))
    # Whoever knows how often each byte occurs, and no more, is at 3.15.
    assert len(whole) == 4 and whole[-1] < 2.8

    folder = str(tmp_path / "part")
    first = losses(torchrun(_SCRIPT, 2, "--steps", "19", "--folder", folder))
    assert first == pytest.approx(whole[:1], abs=0.05)
    rest = losses(torchrun(_SCRIPT, 1, "--steps", "40", "--folder", folder, "--resume"))
    # Its first line is of its first step.
    assert rest == pytest.approx(whole[1:], abs=0.05)  # bf16
