"""What is modelled of a step is what two ranks measure."""

import math
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import llama
from benchmarks.measure import Sent, memory, state_bytes
from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.kernels import product
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.rules import polynomial
from shampoo_fsdp.runtime.parameters import describe
from shampoo_fsdp.tools.dry_step import dry_optimizer, dry_step
from shampoo_fsdp.tools.machine import Machine
from tests.ranks import run_ranks

_PERIOD = 2


def measured(**settings) -> tuple[dict[str, float], list[ParameterSpec]]:
    """Of rank 0, of a Llama of two layers."""
    torch.manual_seed(0)
    model = llama.build(llama.Sizes(dim=160, ffn=416, layers=2, vocab=256))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = []

    def build():
        optimizers.append(Shampoo(model.named_parameters(), **settings))
        return optimizers[0].step

    alive, peak = memory(build, 2 * _PERIOD, _PERIOD)
    (optimizer,) = optimizers
    in_place = {torch.ops.aten.baddbmm_: lambda sum_, a, b, **_: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as products, Sent() as sent:
        for _ in range(_PERIOD):
            optimizer.step()
    assert alive < state_bytes(optimizers) + 2**20
    figures = {
        "flops": products.get_total_flops(),
        "bytes sent": sent.bytes,
        "peak bytes": peak - alive,
    }
    return figures, [describe(name, p, None) for name, p in model.named_parameters()]


def modelled(specs: list[ParameterSpec], config: ShampooConfig) -> dict[str, float]:
    # Not as a GPU multiplies in roots: fp32 matrices as three products of bf16 ones, or in fp16.
    with (
        mock.patch.object(product, "sums_in_fp32", lambda device_type: False),
        mock.patch.object(polynomial, "sums_in_fp32", lambda device_type: False),
        dry_optimizer(specs, config, rank=0) as optimizer,
    ):
        steps = [dry_step(optimizer, Machine()) for _ in range(_PERIOD)]
    return {
        "flops": sum(step.total[kind] for step in steps for kind in ("bf16", "tf32", "fp32")),
        "bytes sent": sum(t.near + t.far for step in steps for t in step.transfers),
        "peak bytes": max(step.peak for step in steps),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner": "kl_shampoo", "root_method": "polynomial"},
        {"preconditioner": "shampoo", "root_method": "coupled_newton", "buckets": 3},
        {"preconditioner": "soap"},
    ],
    ids=lambda settings: settings["preconditioner"],
)
def test_flops_bytes_and_memory_of_two_ranks(settings):
    # Sides of 80 over shards of 208 and 80 rows: some blocks have a part on either rank.
    settings |= {
        "max_preconditioner_dim": 96,
        "precondition_frequency": _PERIOD,
        "refresh_warmup_steps": 0,
        "matmul_precision": "highest",
        "root_dtype": "float32",
        "kernels": "off",
    }
    (found, specs), _ = run_ranks(2, measured, **settings)
    (expected,) = run_ranks(1, modelled, init=False, specs=specs, config=ShampooConfig(**settings))
    assert found["bytes sent"] == expected["bytes sent"] > 0
    # On CPUs, where nothing waits, SOAP looks whether a basis lacks anything, or leaves it.
    looks = settings["preconditioner"] == "soap"
    assert 1.0 - 0.1 * looks - 1e-6 < found["flops"] / expected["flops"] < 1.0 + 1e-6
    # Operators have temporary memory of their own.
    assert found["peak bytes"] == pytest.approx(expected["peak bytes"], rel=0.1)
