"""A step that ends midway, as by Ctrl-C, with gradients in flight."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shampoo_fsdp.runtime.exchange
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
        mock.patch.object(optimizer._excluded, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        optimizer.step()
    (bucket,) = optimizer._parameters.buckets
    exchange = bucket._exchange
    assert exchange._work is not None
    allocate, in_flight = shampoo_fsdp.runtime.exchange.allocate, []

    def watched(buffer: torch.Tensor) -> None:
        in_flight.append(exchange._work is not None)
        allocate(buffer)

    with mock.patch("shampoo_fsdp.runtime.exchange.allocate", watched):
        optimizer.step()
    assert in_flight == [False] * 4
