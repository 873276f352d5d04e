"""A step that ends midway, as by Ctrl-C, with gradients in flight."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo
from tests.ranks import ranks


@ranks(2)
def test_the_next_step_touches_no_memory_that_is_still_in_flight():
    torch.manual_seed(0)
    model = nn.Linear(12, 16, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=16)
    model(torch.ones(1, 12)).sum().backward()
    with (
        mock.patch.object(optimizer._parameters.excluded, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        optimizer.step()
    (bucket,) = optimizer._parameters.buckets
    exchange = bucket._exchange
    work, wait, waited_for = exchange._wait, exchange._finish, []
    in_flight = weakref.ref(exchange._arriving.untyped_storage())
    assert work is not None and in_flight() is not None
    gc.collect()

    def watched() -> None:
        if exchange._wait is not None:
            waited_for.append((exchange._wait, in_flight() is not None))
        wait()

    with mock.patch.object(exchange, "_finish", watched):
        optimizer.step()
    assert waited_for[0] == (work, True)
    assert len(waited_for) == 3  # this one's gradients and updates
