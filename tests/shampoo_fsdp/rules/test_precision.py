"""Matrix products of a step are in fp32 whatever the program has chosen, which it finds again."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
from shampoo_fsdp.rules.precision import add_gram
from tests.ranks import run_ranks

cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

# Each in a process of its own: the choice is the process's, and parts of it cannot be taken back.
CHOICES = {
    "nothing": "pass",
    "old interface, high": "torch.set_float32_matmul_precision('high')",
    "older interface": "cuda.allow_tf32 = True",
    "new interface": "cuda.fp32_precision = 'tf32'; mkldnn.fp32_precision = 'bf16'",
    "new interface, for everything": "torch.backends.fp32_precision = 'tf32'",
    "old, then new": "torch.set_float32_matmul_precision('high'); cuda.fp32_precision = 'ieee'",
    "new, then old": "torch.backends.fp32_precision = 'tf32'; cuda.allow_tf32 = True",
}


def read(get: Callable[[], object]) -> object:
    try:
        return get()
    except RuntimeError:  # torch cannot say it in its old words, after it was told in new ones
        return "refused"


def state() -> list[object]:
    return [
        read(torch.get_float32_matmul_precision),
        read(lambda: cuda.allow_tf32),
        cuda.fp32_precision,
        mkldnn.fp32_precision,
        torch.backends.fp32_precision,
    ]


class Watch(TorchDispatchMode):
    """The states at the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[list[object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function) and (now := state()) not in self.inside:
            self.inside.append(now)
        return function(*args, **(kwargs or {}))


def step_after(choice: str, precision: str = "highest") -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("weight", weight)], matmul_precision=precision, preconditioner="shampoo")
    exec(CHOICES[choice])
    before = state()
    with Watch() as watch:
        for _ in range(2):
            weight.grad = torch.ones(4, 4)
            optimizer.step()
    fp32 = ["highest", False, "ieee", "ieee", before[4]]
    tf32 = ["high", True, "tf32", "ieee", before[4]]  # on CPUs fp32
    assert watch.inside == ([fp32] if precision == "highest" else [tf32, fp32])
    assert state() == before

    # What followed the choice for everything still does.
    followed = before[4] != "none"
    torch.backends.fp32_precision = "ieee"
    assert not followed or cuda.fp32_precision == mkldnn.fp32_precision == "ieee"


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_the_program_is_set_aside_and_restored(choice):
    run_ranks(1, step_after, init=False, choice=choice)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_other_precisions_leave_nothing_to_the_library_of_a_cpu(precision):
    """It would choose by the size of a stack, which depends on the mesh."""
    run_ranks(1, step_after, init=False, choice="new interface", precision=precision)


@pytest.mark.parametrize("blocks", [1, 2])
def test_grams_in_bf16_are_exact_sums_of_rounded_entries(blocks):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16 * blocks, 12))
    settings = {"preconditioner": "shampoo", "matmul_precision": "medium"}
    optimizer = Shampoo([("weight", weight)], max_preconditioner_dim=16, **settings)
    weight.grad = torch.randn(16 * blocks, 12, generator=generator)
    optimizer.step()
    rounded = weight.grad.bfloat16().double().view(blocks, 16, 12)
    factors = optimizer.state[weight]["factors"].view(blocks, -1)[:, :256].view(blocks, 16, 16)
    expected = rounded @ rounded.mT * (1.0 - optimizer.defaults["betas"][1])
    torch.testing.assert_close(factors.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(1, 5), (7, 3), (130, 70)])
def test_a_gram_is_added_whole_and_symmetric(n, m, dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2, n, m, generator=generator).to(dtype)
    start = torch.eye(n).repeat(2, 1, 1)
    factors = add_gram(start.clone(), blocks, 0.3)
    expected = start.double() + 0.3 * blocks.double() @ blocks.double().mT
    assert factors.dtype == torch.float32
    torch.testing.assert_close(factors.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors, factors.mT, rtol=1e-6, atol=1e-6)
