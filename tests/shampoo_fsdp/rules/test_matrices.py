"""A matrix of one row is a vector, and no factor is out of proportion to its block."""

import pytest
import torch
from rich.console import Console
from torch import nn

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.plan.grid import make_grid
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.rules.matrices import factor_kinds
from shampoo_fsdp.runtime.choice import is_preconditioned
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.tools.plan_report import print_plan


def factors(shape: tuple[int, ...], **settings) -> set[tuple[int, ...]]:
    """For each shape of block the sides that have a factor."""
    config = ShampooConfig(**settings)
    if not is_preconditioned("w", shape, config):
        return set()
    found = set()
    for block in make_grid(shape, config).block_shapes:
        kinds = factor_kinds(block, config)
        found.add(tuple(n for n, kind in zip(block, kinds, strict=True) if kind == "full"))
    return found


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((4096, 4096), {(1024, 1024)}),
        ((1024, 8192), {(1024, 1024)}),  # keys of grouped queries
        ((14336, 4096), {(1024, 1024)}),
        ((1536, 7168), {(768, 1024)}),  # projections to a low rank
        ((576, 7168), {(576, 1024)}),
        ((256, 7168), {(256, 1024)}),  # a router of 256 experts
        ((8, 512, 2048), {(512, 1024)}),  # experts
        ((64, 3, 3, 3), {(64, 27)}),
        ((24, 64), {(24, 64)}),
        ((64, 4096), {(64,)}),
        ((8, 4096), {(8,)}),  # adapters of a low rank, routers of few experts
        ((4096, 8), {(8,)}),
        ((2, 100_000), {(2,)}),
    ],
)
def test_factors_of_shapes_that_models_have(shape, sides):
    assert factors(shape) == sides


@pytest.mark.parametrize(
    "shape", [(1, 1000), (1000, 1), (1, 1), (4, 1, 1000), (4, 1000, 1), (8, 1, 1, 1), (1, 8, 3, 3)]
)
def test_one_row_or_column_is_a_vector(shape):
    assert not factors(shape)
    assert factors(shape, precondition_1d=True) == make_grid(shape, ShampooConfig()).block_shapes


def test_settings_ask_for_more_factors():
    assert factors((4, 8), merge_dims="small") == {(32,)}  # which is no vector
    assert factors((8, 4096), max_factor_ratio=128) == {(8, 1024)}


def test_the_plan_and_the_optimizer_say_which_sides_have_no_factor(capsys):
    shapes = {"adapter": (8, 4096), "w": (64, 64)}
    specs = [ParameterSpec(n, s, (0,), (1,), (None,)) for n, s in shapes.items()]
    print_plan(JobPlan("adapter", [specs], ShampooConfig()).figures, Console(width=200))
    said = "Sides without a factor, by the shape of the block (8 x 1024: 1024)"
    assert said in capsys.readouterr().out
    optimizer = Shampoo([(n, nn.Parameter(torch.zeros(s))) for n, s in shapes.items()])
    assert optimizer.sides_without_factor() == {(8, 1024): [1024]}
