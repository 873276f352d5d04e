"""The benchmark's count of a checkpoint's items is what torch.distributed.checkpoint plans."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.checkpoint_items import Items, count_items
from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.runtime.parameters import describe
from shampoo_fsdp.tools.models import model_specs
from tests.distributed.test_checkpoints import states
from tests.models import build
from tests.ranks import run_ranks

SETTINGS = {"max_preconditioner_dim": 16}


def planned_and_counted(layout: str, shampoo: bool) -> tuple[Items, Items]:
    built = build(layout)
    named = list(built.model.named_parameters())
    if shampoo:
        optimizer: torch.optim.Optimizer = Shampoo(named, **SETTINGS)
    else:
        optimizer = torch.optim.AdamW([p for _, p in named])
    LambdaLR(optimizer, lambda step: 1.0)
    planner = DefaultSavePlanner()
    planner.set_up_planner(states(built, optimizer, flat=True), None, dist.get_rank() == 0)
    plans = [None] * dist.get_world_size()
    dist.all_gather_object(plans, planner.create_local_plan())
    items = [item for plan in plans for item in plan.items]
    shards = [item for item in items if item.type == WriteItemType.SHARD]
    plans, metadata = planner.create_global_plan(plans)
    written = [item for plan in plans for item in plan.items if item.type == WriteItemType.SHARD]
    numbers = len(items) - len(shards)
    planned = Items(len(shards), len(written), numbers, len(metadata.state_dict_metadata))
    specs = [describe(name, p, None) for name, p in named]
    counted = count_items(specs, ShampooConfig(**SETTINGS) if shampoo else None)
    return planned, counted


@pytest.mark.parametrize("layout", ["fsdp", "tp_fsdp"])
@pytest.mark.parametrize("shampoo", [True, False])
def test_what_is_counted_is_planned(layout, shampoo):
    for planned, counted in run_ranks(4, planned_and_counted, layout=layout, shampoo=shampoo):
        assert counted == planned


def test_the_largest_model_has_no_more_items_than_with_adamw():
    specs = model_specs("llama3-405b", {"dp_shard": 128, "tp": 8})
    ours, adamw = count_items(specs, ShampooConfig()), count_items(specs, None)
    assert adamw.pieces == 3 * len(specs) * 1024
    assert ours.pieces <= adamw.pieces and ours.written_pieces <= adamw.written_pieces
    assert ours.planned <= adamw.planned and ours.keys <= adamw.keys
