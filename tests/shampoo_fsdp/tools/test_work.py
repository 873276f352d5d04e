"""What single operators and kernels of our own cost a pretended GPU."""

import pytest
import torch

from shampoo_fsdp.kernels.adamw import adamw_masked
from shampoo_fsdp.kernels.gram import update_factors
from shampoo_fsdp.kernels.momenta import momenta
from shampoo_fsdp.kernels.product import Sum, product
from shampoo_fsdp.kernels.refresh import keep, parts, two_sums
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

B, N, M, ROWS = 3, 256, 512, 10
LOW = torch.bfloat16


def made(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def rows():
    return torch.zeros(ROWS, dtype=torch.int32, device=CUDA)


def product_of(dtype, *, gram=False):
    a = made(B, N, M, dtype=dtype)
    torch.bmm(a, a.mT if gram else made(B, M, N, dtype=dtype), out_dtype=torch.float32)


def assign_rows():
    made(100, M)[rows()] = made(ROWS, M)


def moved(size):
    return {"bytes": size, "operands": size}


PRODUCT = 2 * B * N * N * M
TAKEN = {"bytes": 4 * ROWS * (1 + 2 * M)}  # numbers of rows; rows that are read and written
OPERATORS = {
    "rows": (lambda: made(100, M).index_select(0, rows()), TAKEN),
    "rows by an index": (lambda: made(100, M)[rows()], TAKEN),
    "rows assigned": (assign_rows, TAKEN),
    "rows copied": (lambda: made(100, M).index_copy_(0, rows(), made(ROWS, M)), TAKEN),
    "a sum": (lambda: made(M).add_(made(M)), {"bytes": 12 * M}),
    "a copy": (lambda: made(M).copy_(made(M, dtype=LOW)), {"bytes": 6 * M}),
    "zeros": (lambda: torch.zeros_like(made(M)), {"bytes": 4 * M}),
    "a view": (lambda: made(M, N).mT[:5], {}),
    "fp16": (lambda: product_of(torch.half), {"bf16": PRODUCT} | moved(B * N * (4 * M + 4 * N))),
    "a gram": (
        lambda: product_of(LOW, gram=True),
        {"bf16": PRODUCT} | moved(B * N * (2 * M + 4 * N)),
    ),
    "fp32": (
        lambda: made(B, N, M).bmm(made(B, M, N)),
        {"fp32": PRODUCT} | moved(B * N * (8 * M + 4 * N)),
    ),
    "QR": (lambda: torch.linalg.qr(made(B, N, N)), {"decompositions": B, "qr": B * N**1.5}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator(name):
    operator, expected = OPERATORS[name]
    with pretended_gpu(), Work() as work:
        operator()
    total = dict(work.total)
    assert total.pop("launches", 0) == bool(expected) + (name.startswith("rows"))  # zeros
    if name.startswith("rows"):
        total["bytes"] -= 4 * ROWS
    assert total == expected


def adamw_kernel():
    numbers = dict(step_size=1e-3, lost=0.0, rate1=0.1, rate2=0.05, eps=1e-8, root=1.0)
    tensors = [made(M) for _ in range(4)]
    adamw_masked(*tensors, made((), dtype=torch.int64), 1e15, **numbers)


def momenta_kernel():
    tensors = [made(B, N, M, dtype=dtype) for dtype in (torch.float32,) * 3 + (LOW,)]
    momenta(tensors[0], made(B), *tensors[1:], 0.1, 0.05, 0.9, 1e-8)


def gram_kernel():
    update_factors(made(B, N, N), made(B, N, M, dtype=LOW), made(B), 0.1)


def product_kernel():
    product(made(B, N, N), made(B, N, N), Sum(torch.float32), symmetric=True)


def sums_kernel():
    two_sums(made(B, N, N), made(B, N, N), made(B), made(B), (0.5, 0.5, 1.0, 1.0, 1.0))


def keep_kernel():
    bad, changes = made(B, dtype=torch.bool), made(B, parts(N), 2)
    keep(made(B, N, N), made(B, N, N, dtype=LOW), bad, changes)


# By what their docstrings say, per element; three of four tiles of 128 make a triangle.
KERNELS = {
    adamw_kernel: {"bytes": 28 * M},
    momenta_kernel: {"bytes": 22 * B * N * M},
    gram_kernel: {"bytes": B * N * (2 * M + 6 * N), "bf16": PRODUCT * 3 / 4},
    product_kernel: {"bytes": 12 * B * N * N, "bf16": 3 * 2 * B * N**3 * 3 / 4},
    sums_kernel: {"bytes": 16 * B * N * N},
    keep_kernel: {"bytes": 8 * B * N * N},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_of_our_own(kernel):
    with pretended_gpu(), Work(Machine()) as work:
        kernel()
    total = dict(work.total)
    assert 1 <= total.pop("launches") <= 3  # sums of what programs have found
    expected = KERNELS[kernel]
    assert total["bytes"] == pytest.approx(expected["bytes"], rel=1e-3, abs=64)
    assert total.get("bf16", 0) == expected.get("bf16", 0)
