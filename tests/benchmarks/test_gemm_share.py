"""What a GPU would multiply on a step, in which precision, and that its host waits for nothing."""

import json

import pytest
import torch

from benchmarks.gemm_share import main, work_of_block
from benchmarks.pretended_gpu import CUDA
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.rules.device import on_device


@pytest.mark.parametrize(("m", "n"), [(64, 64), (96, 32)])
def test_the_products_of_a_step_and_of_a_refresh(m, n):
    """Fake tensors have no values: reading one on the host would raise."""
    every, refresh = work_of_block((m, n), on_device(ShampooConfig(), CUDA))
    del every["bytes"], refresh["bytes"]
    assert every == {"bf16": 3 * 2 * m * n * (m + n)}  # whitening, grams, direction
    cubes = m**3 + n**3
    vectors = 2 * 2 * 4 * (m**2 + n**2)  # the check of the roots: 4 products with 2 vectors
    # The first polynomial, with the square for the norm: 3 products, each as 3 of bf16.
    assert refresh == {"bf16": 3 * 3 * 2 * cubes, "tf32": 9 * 2 * cubes, "fp32": vectors}


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap"])
def test_other_rules_multiply_in_their_precision(preconditioner):
    every, _ = work_of_block(
        (64, 64), on_device(ShampooConfig(preconditioner=preconditioner), CUDA)
    )
    assert every.keys() - {"bytes"} == {"bf16" if preconditioner == "shampoo" else "tf32"}


def test_the_share_of_llama3_8b(capsys):
    main(["--json"])
    on_8, on_64 = json.loads(capsys.readouterr().out)
    assert on_8["share"] <= 0.035
    assert on_64["share"] <= 0.005
    assert on_8["roots' share of these"] <= 0.06
    assert on_8["decompositions on a step"] == 0


def test_the_choice_of_precision_is_restored():
    before = torch.backends.cuda.matmul.fp32_precision
    work_of_block((8, 8), on_device(ShampooConfig(), CUDA))
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_passes_over_a_block():
    """Bytes that move per parameter: what is no product costs a GPU more time than the products."""
    every, refresh = work_of_block((256, 256), on_device(ShampooConfig(), CUDA))
    assert every["bytes"] <= 140 * 256**2
    assert refresh["bytes"] <= 580 * 256**2
