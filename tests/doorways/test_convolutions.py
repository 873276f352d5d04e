"""examples/convolutions.py: DDP and FSDP2 train alike, and take over each other's checkpoints."""

from pathlib import Path

import pytest

from tests.doorways.launch import losses, torchrun

pytest.importorskip("mlxtend")

_SCRIPT = "examples/convolutions.py"


def test_both_layouts_train_alike_and_go_on_from_each_other(tmp_path: Path) -> None:
    ddp, fsdp2 = (
        losses(torchrun(_SCRIPT, 2, "--layout", layout, "--steps", "29", "--folder", str(folder)))
        for layout, folder in (("ddp", tmp_path), ("fsdp2", tmp_path / "other"))
    )
    # Blocks of other stacks are rounded in another way; training makes that larger.
    assert ddp == pytest.approx(fsdp2, abs=0.02)
    assert len(ddp) == 2 and ddp[-1] < 1.0  # guesses are at 2.30

    arguments = ("--layout", "fsdp2", "--steps", "40", "--folder", str(tmp_path), "--resume")
    rest = losses(torchrun(_SCRIPT, 1, *arguments))
    # Its first line is of its first step.
    assert len(rest) == 2 and max(rest) < 1.0
