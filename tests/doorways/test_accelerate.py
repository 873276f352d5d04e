"""examples/accelerate_fsdp2.py: it trains, and goes on from what it saved on fewer ranks."""

from pathlib import Path

import pytest

from tests.doorways.checkpoints import changed
from tests.doorways.launch import half_way, losses, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

_SCRIPT = "examples/accelerate_fsdp2.py"


def test_it_trains_and_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    first = losses(torchrun(_SCRIPT, 2, "--steps", "30", "--folder", before))
    # A model that has learnt nothing is at 5.55.
    assert len(first) == 6 and first[-1] < 2.8

    rest = losses(torchrun(_SCRIPT, 1, "--steps", "40", "--folder", after, "--resume", before))
    assert len(rest) == 2 and max(rest) < half_way(first)
    weights = "pytorch_model_fsdp_0"
    assert changed(tmp_path / "before" / weights, tmp_path / "after" / weights) == 21
