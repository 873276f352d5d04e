"""Memory that a step frees while transfers are under way is not used too early.

Why that holds. All kernels of a step are on one stream, the current one; transfers alone are on
NCCL's. The allocator hands freed memory out again to work of the stream that it was taken on, so
what follows in it comes after all that this stream was given before. A transfer begins after what
the current stream had been given when it set out, so what it sends has been packed; and nothing
that it sends or fills is let go before `Work.wait`, by which the current stream waits for it: what
is written into that memory later comes after the transfer. The workspace is no transfer's memory:
gradients are picked into it from what has arrived, and updates are picked out of it, by kernels of
the current stream, before it is released; the next step takes and fills memory on the same stream.
Row numbers, which those kernels read, live as long as the optimizer.

Each test lets the host run far ahead of the device, holds ranks up at different times, overwrites
what a step has freed with NaN at once, and compares with a run that waits for the device around
every transfer.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime.exchange import Exchange
from tests.cuda.meshes import SETTINGS, own_device, sharded_llama, start
from tests.models import full_parameters, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.cuda

STEPS = 12
CYCLES = 10_000_000  # some 5 ms of a GPU


class _Disturbance:
    """What a program may do beside the optimizer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.cuda.Stream() if device.type == "cuda" else None
        self._kept: list[Tensor] = []

    def before(self, step: int) -> None:
        """Hold up this rank's stream, and keep another one busy."""
        if self._other is None:
            return
        if step % dist.get_world_size() == dist.get_rank():
            torch.cuda._sleep(CYCLES)
        with torch.cuda.stream(self._other):
            torch.cuda._sleep(3 * CYCLES)
            self._overwrite()

    def after(self) -> None:
        """Take what the step has freed, and overwrite it."""
        self._overwrite()

    def _overwrite(self) -> None:
        sizes = [2**k for k in range(6, 19)] * 4
        nans = [torch.full((size,), torch.nan, device=self._device) for size in sizes]
        self._kept = nans[::3]  # others are free again


def _synchronized(method):
    def waits(*arguments):
        torch.cuda.synchronize()
        result = method(*arguments)
        torch.cuda.synchronize()
        return result

    return waits


def weights(device_type: str, careful: bool, **settings: object) -> dict[str, Tensor]:
    """After some steps, with disturbances or with waiting around every transfer."""
    start(device_type)
    model: nn.Module = sharded_llama(device_type)
    optimizer = Shampoo(model.named_parameters(), **SETTINGS, **settings)
    assert len(optimizer._parameters.buckets) > 1
    disturbance = _Disturbance(own_device(device_type))
    patched = nullcontext()
    if careful and device_type == "cuda":
        patched = mock.patch.multiple(
            Exchange,
            _set_out=_synchronized(Exchange._set_out),
            _finish=_synchronized(Exchange._finish),
        )
    with patched:
        for step in range(STEPS):
            if not careful:
                disturbance.before(step)
            train(model, optimizer, [step])
            if not careful:
                disturbance.after()
    return {name: p.cpu() for name, p in full_parameters(model).items()}


SETTINGS_OF_BUCKETS = [
    {"preconditioner": "shampoo"},
    {"preconditioner": "kl_shampoo"},
    {"preconditioner": "soap", "communication_dtype": "bfloat16"},
]


@pytest.mark.parametrize("settings", SETTINGS_OF_BUCKETS)
def test_what_a_step_frees_may_be_overwritten_and_transfers_lose_nothing(device, ranks, settings):
    common = {"device_type": device.type, "buckets": 4, **settings}
    expected = run_ranks(ranks, weights, init=False, careful=True, **common)
    found = run_ranks(ranks, weights, init=False, careful=False, **common)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(p.isfinite().all() for p in ours.values())
