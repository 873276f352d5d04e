"""A step that waits long says for whom, and goes on."""

import logging
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime import stalls
from shampoo_fsdp.runtime.ranks import in_runs
from tests.ranks import run_ranks


class Ear(logging.Handler):
    def __init__(self, hear: Callable[[str], object]) -> None:
        super().__init__()
        self.hear = hear
        logging.getLogger("shampoo_fsdp.runtime.stalls").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())


SAID = "gradients of bucket 1 of 2 on step 2: the exchange with ranks 1 (of 0-1, which"


def steps(late: bool) -> tuple[list[str], Tensor]:
    """Of two ranks the second may sleep in the second of three steps until the first complains."""
    store, said = _get_default_store(), list[str]()

    def hear(message: str) -> None:
        said.append(message)
        if message.startswith(SAID):
            store.set("heard", "yes")

    Ear(hear)
    mesh, named = init_device_mesh("cpu", (2,)), list[tuple[str, nn.Parameter]]()
    for name in ("a", "b"):
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(len(named)))
        named.append((name, nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))))
    optimizer = Shampoo(named, buckets=2, stall_warning_seconds=0.2)
    for step in range(3):
        for _, parameter in named:
            parameter.grad = parameter.detach().sin()
        if late and step == 1 and dist.get_rank() == 1:
            store.wait(["heard"])
        optimizer.step()
    return said, named[0][1].full_tensor().detach()


def test_who_waits_says_so_once_and_goes_on():
    (said, found), _ = run_ranks(2, steps, late=True)
    (message,) = [message for message in said if message.startswith(SAID)]
    assert "This rank goes on waiting" in message
    assert torch.equal(found, run_ranks(2, steps, late=False)[0][1])


def test_on_cuda_the_host_waits_for_nothing(monkeypatch):
    """It goes on; a thread looks whether the device has, and ends when all has arrived."""
    heard, arrived = threading.Event(), threading.Event()
    monkeypatch.setattr(stalls, "_arrival", lambda device: arrived.is_set)
    Ear(lambda message: message == "late" and heard.set())
    with stalls.told_if_long(torch.device("cuda"), lambda: 0.01, lambda seconds: "late"):
        (looking,) = [t for t in threading.enumerate() if t.name == "shampoo_fsdp stalls"]
    assert heard.wait(60)
    arrived.set()
    looking.join(60)
    assert not looking.is_alive()


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranks_in_runs(numbers, text):
    assert in_runs(numbers) == text
