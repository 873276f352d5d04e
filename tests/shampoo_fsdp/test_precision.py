"""Matrix products of a step are in fp32 whatever the program has chosen, which it finds again."""

import subprocess
import sys

import pytest

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
PROGRAM = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from shampoo_fsdp import Shampoo

cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

def read(get):
    try:
        return get()
    except RuntimeError:  # torch cannot say it in its old words, after it was told in new ones
        return "refused"

def state():
    return [
        read(torch.get_float32_matmul_precision), read(lambda: cuda.allow_tf32),
        cuda.fp32_precision, mkldnn.fp32_precision, torch.backends.fp32_precision,
    ]

inside = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not inside and "bmm" in str(function):
            inside.append(state())
        return function(*args, **(kwargs or {}))

weight = torch.nn.Parameter(torch.ones(4, 4))
optimizer = Shampoo([("weight", weight)])
CHOICE
before = state()
weight.grad = torch.ones(4, 4)
with Watch():
    optimizer.step()
assert inside == [["highest", False, "ieee", "ieee", before[4]]], inside
assert state() == before, (before, state())

# What followed the choice for everything still does.
followed = before[4] != "none" and "allow" not in "CHOICE_TEXT"
torch.backends.fp32_precision = "ieee"
assert not followed or cuda.fp32_precision == mkldnn.fp32_precision == "ieee"
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_the_program_is_set_aside_and_restored(choice):
    text = PROGRAM.replace("CHOICE_TEXT", choice).replace("CHOICE", CHOICES[choice])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
