"""Matrix products of a step are in fp32 whatever the program has chosen, which it finds again."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
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


def step_after(choice: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("weight", weight)])
    exec(CHOICES[choice])
    before = state()
    weight.grad = torch.ones(4, 4)
    with Watch() as watch:
        optimizer.step()
    assert watch.inside == [["highest", False, "ieee", "ieee", before[4]]]
    assert state() == before

    # What followed the choice for everything still does.
    followed = before[4] != "none"
    torch.backends.fp32_precision = "ieee"
    assert not followed or cuda.fp32_precision == mkldnn.fp32_precision == "ieee"


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_the_program_is_set_aside_and_restored(choice):
    run_ranks(1, step_after, init=False, choice=choice)
