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
    "old interface, highest": "torch.set_float32_matmul_precision('highest')",
    "old interface, high": "torch.set_float32_matmul_precision('high')",
    "old interface, medium": "torch.set_float32_matmul_precision('medium')",
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
    """The state at the first matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[list[object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.inside and "bmm" in str(function):
            self.inside.append(state())
        return function(*args, **(kwargs or {}))


def step_after(choice: str, precision: str = "highest") -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("weight", weight)], matmul_precision=precision, preconditioner="shampoo")
    exec(CHOICES[choice])
    before = state()
    weight.grad = torch.ones(4, 4)
    with Watch() as watch:
        optimizer.step()
    if precision == "highest":
        assert watch.inside == [["highest", False, "ieee", "ieee", before[4]]]
    else:  # of the first product, a gram of fp32 matrices
        assert watch.inside == [["medium", True, "tf32", "bf16", before[4]]]
    assert state() == before

    # What followed the choice for everything still does.
    followed = before[4] != "none"
    torch.backends.fp32_precision = "ieee"
    assert not followed or cuda.fp32_precision == mkldnn.fp32_precision == "ieee"


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_the_program_is_set_aside_and_restored(choice):
    run_ranks(1, step_after, init=False, choice=choice)


@pytest.mark.parametrize("choice", ["nothing", "new interface", "old interface, high"])
def test_products_in_bf16_leave_it_so_too(choice):
    run_ranks(1, step_after, init=False, choice=choice, precision="medium")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(1, 5), (7, 3), (128, 40), (130, 70), (257, 33)])
def test_a_gram_is_added_whole_and_symmetric(n, m, dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2, n, m, generator=generator).to(dtype)
    start = torch.eye(n).repeat(2, 1, 1)
    factors = add_gram(start.clone(), blocks, 0.3)
    expected = start.double() + 0.3 * blocks.double() @ blocks.double().mT
    assert factors.dtype == torch.float32
    torch.testing.assert_close(factors.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors, factors.mT, rtol=1e-6, atol=1e-6)
