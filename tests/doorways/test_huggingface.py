"""examples/huggingface.py: it trains, and goes on from a checkpoint on fewer ranks."""

from pathlib import Path

import pytest

from tests.doorways.checkpoints import changed
from tests.doorways.launch import half_way, losses, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

_SCRIPT = "examples/huggingface.py"


# GPT-2's weights are [in, out], and its output layer is the embedding.
@pytest.mark.parametrize("model, weights", [("llama", 21), ("gpt2", 28)])
def test_it_trains_and_goes_on_with_fewer_ranks(tmp_path: Path, model: str, weights: int) -> None:
    same = ("--model", model, "--folder", str(tmp_path))
    first = losses(torchrun(_SCRIPT, 2, *same, "--steps", "20"))
    # A model that has learnt nothing is at 5.55.
    assert len(first) == 4 and first[-1] < 2.9

    saved = tmp_path / "checkpoint-20"
    rest = losses(torchrun(_SCRIPT, 1, *same, "--steps", "30", "--resume", str(saved)))
    assert len(rest) == 2 and max(rest) < half_way(first)
    folder = "pytorch_model_fsdp_0"
    assert changed(saved / folder, tmp_path / "checkpoint-30" / folder) >= weights
