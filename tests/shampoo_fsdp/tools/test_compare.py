"""`python -m shampoo_fsdp compare`: a table, a page, and errors that name the option."""

import re

import pytest

from shampoo_fsdp.tools.command import main
from shampoo_fsdp.tools.compare.contest import Run
from tests.ranks import run_ranks
from tests.shampoo_fsdp.tools.test_pages import check

MINE = """
import torch
import torch.distributed as dist
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x).tanh()
        return (x - y).square().mean()

def build():
    return Net()

def batches():
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    for _ in range(24):
        x = torch.randn(32, 8, generator=generator)
        yield x, x.roll(1, 1).tanh()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return ["compare", "--model", "mine.py:build", "--data", "mine.py:batches"]


def test_a_model_of_ones_own_is_compared_in_a_table_and_on_a_page(mine, tmp_path, capsys):
    assert main([*mine, "--steps", "24", "--lr", "Muon=0.05"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"AdamW .* 24 ", table) and re.search(r"Muon +│ +0.05 ", table)
    check(tmp_path / "compare.html", ("Shampoo",), pictures=2)


def _on_a_rank(arguments: list[str]) -> int:
    import os

    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # as torchrun does
    return main(arguments)


def test_it_runs_under_torchrun(mine, tmp_path):
    assert run_ranks(2, _on_a_rank, init=False, arguments=[*mine, "--steps", "12"]) == [0, 0]
    assert (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "100"], "fewer than the 100 batches"),
        (["--model", "mine.py:made"], "no function 'made'"),
    ],
)
def test_what_is_wrong_with_the_model_or_the_batches_is_one_line(mine, capsys, options, says):
    assert main([*mine, *options]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_where_a_curve_reaches_a_loss_is_between_two_points():
    run = Run("Shampoo", 0.1, [10, 20, 30], [3.0, 2.0, 1.0], [1.0, 2.0, 4.0])
    assert run.reached(1.5, run.steps) == 25
    assert run.reached(1.5, run.seconds) == 3.0
    assert run.reached(0.5, run.steps) is None
