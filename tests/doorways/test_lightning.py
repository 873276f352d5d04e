"""examples/lightning_fsdp2.py: it trains, and goes on from a checkpoint on fewer ranks."""

from pathlib import Path

import pytest

from tests.doorways.launch import half_way, losses, torchrun

pytest.importorskip("lightning")

_SCRIPT = "examples/lightning_fsdp2.py"


def test_it_trains_and_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    first = losses(torchrun(_SCRIPT, 2, "--steps", "39", "--folder", folder))
    # Whoever knows how often each byte occurs, and no more, is at 3.15.
    assert len(first) == 3 and first[-1] < 2.8

    rest = losses(torchrun(_SCRIPT, 1, "--steps", "50", "--folder", folder, "--resume"))
    # Its first line is of its first step. Lightning does not go on where it was in the data: the
    # batches are not those of a run without a break.
    assert len(rest) == 2 and max(rest) < half_way(first)
