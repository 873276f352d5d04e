"""What a GPU would multiply for a block, in which precision."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.kernels.language import kernels
from shampoo_fsdp.rules import Step
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

_PRODUCTS = ("bf16", "tf32", "fp32")


def work_of_block(shape: Sequence[int], config: ShampooConfig) -> tuple[Counter[str], Counter[str]]:
    """FLOPs by precision, decompositions and bytes (see :class:`Work`), of a step without a refresh
    and of a refresh.

    Args:
        shape: of the block, without batch dimensions.
        config: that of a GPU.
    """
    values = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group = GroupSettings.of(values, config)
    with pretended_gpu(), kernels(config.kernels):
        stack = BlockStack(shape, [0], config, torch.empty(1, *shape, device=CUDA))
        # The refresh period's phase is 0: a step of its multiple refreshes.
        count = 1000 * config.precondition_frequency
        step = stack.begin(Step(group, [count], [count], [True], [True], [False]))
        with Work() as work:
            work.part = "factors"
            stack.accumulate(step)
            work.part = "roots"
            stack.refresh(step)
            work.part = "direction"
            stack.direct(step)
    return work.counts["factors"] + work.counts["direction"], work.counts["roots"]


@pytest.mark.parametrize(("m", "n"), [(64, 64), (96, 32)])
def test_the_products_of_a_step_and_of_a_refresh(m, n):
    """Tensors without values: reading one on the host would raise."""
    every, refresh = work_of_block((m, n), on_device(ShampooConfig(kernels="off"), CUDA))
    # Whitening, grams, direction.
    assert {kind: every[kind] for kind in _PRODUCTS if every[kind]} == {
        "bf16": 3 * 2 * m * n * (m + n)
    }
    cubes = m**3 + n**3
    vectors = 2 * 2 * 4 * (m**2 + n**2)  # the check of the roots: 4 products with 2 vectors
    # The first polynomial, with the square for the norm: 3 products, each as 3 of bf16. The others
    # are in fp16, at the same rate.
    assert {kind: refresh[kind] for kind in _PRODUCTS} == {
        "bf16": (3 * 3 + 9) * 2 * cubes,
        "tf32": 0,
        "fp32": vectors,
    }
    assert not refresh["decompositions"]


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap"])
def test_other_rules_multiply_in_their_precision(preconditioner):
    config = on_device(ShampooConfig(preconditioner=preconditioner), CUDA)
    every, _ = work_of_block((64, 64), config)
    used = {kind for kind in _PRODUCTS if every[kind]}
    assert used == {"bf16" if preconditioner == "shampoo" else "tf32"}


def test_passes_over_a_block():
    """Bytes that move per parameter: what is no product costs a GPU more time than the products."""
    every, refresh = work_of_block((256, 256), on_device(ShampooConfig(kernels="off"), CUDA))
    assert every["bytes"] - every["operands"] <= 125 * 256**2
    assert refresh["bytes"] - refresh["operands"] <= 830 * 256**2
    assert every["launches"] <= 52
    assert refresh["launches"] <= 160


def test_passes_of_our_kernels_over_a_block():
    every, refresh = work_of_block((256, 256), on_device(ShampooConfig(), CUDA))
    assert every["bytes"] <= 85 * 256**2
    assert refresh["bytes"] <= 330 * 256**2
    assert every["launches"] <= 36
    assert refresh["launches"] <= 60
