"""What Shampoo's checkpoints cost, beside AdamW's of the same model.

    python -m benchmarks.checkpoint

Three tables: the items of a checkpoint of a large model on a large mesh, counted from the plan; the
time that torch.distributed.checkpoint takes to plan for different numbers of items; and time and
size of saving and loading a small model on ranks of this machine.
"""

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import llama
from benchmarks.checkpoint_items import count_items
from benchmarks.ranks import run_on_ranks
from benchmarks.rows import Row, shampoo_row, torch_rows
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.checkpoint.owned import OwnedBlocks
from shampoo_fsdp.tools.models import model_specs

__all__ = ["main"]

_RANKS_OF_PLANS = 16
_BLOCKS = 8  # along each side of a parameter
_SIDE = 64
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="llama3-405b", help="whose items are counted")
    parser.add_argument("--dp_shard", type=int, default=128)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument(
        "--items", type=int, nargs="+", default=[12_500, 25_000, 50_000, 100_000], help="to plan"
    )
    parser.add_argument("--ranks", type=int, default=2, help="that save")
    parser.add_argument("--dim", type=int, default=512, help="of the model that is saved")
    parser.add_argument("--saves", type=int, default=5, help="of which the median time is shown")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of tables")
    options = parser.parse_args(arguments)
    sizes = llama.Sizes(dim=options.dim, ffn=options.dim * 11 // 4)
    figures = {
        "items": counted(options.model, {"dp_shard": options.dp_shard, "tp": options.tp}),
        "planning": run_on_ranks(1, planning, options.items, init=False),
        "saving": run_on_ranks(options.ranks, saving, _rows(), sizes, options.saves),
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    console = Console(width=None if Console().is_terminal else 130)
    mesh = f"dp_shard={options.dp_shard},tp={options.tp}"
    titles = {
        "items": f"Items of a checkpoint of {options.model} on {mesh}, model and optimizer",
        "planning": f"Milliseconds of planning, {_RANKS_OF_PLANS} ranks",
        "saving": f"Saving and loading on {options.ranks} ranks",
    }
    for name, title in titles.items():
        console.print(_table(title, figures[name]))


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(rows[0]):
        table.add_column(head.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        cells = [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in list(row.values())[1:]]
        table.add_row(str(next(iter(row.values()))), *cells)
    return table


def counted(model: str, mesh: dict[str, int]) -> list[dict[str, Any]]:
    """Items by optimizer, and as multiples of AdamW's."""
    specs = model_specs(model, mesh)
    rows = []
    for name, config in {
        "AdamW": None,
        "Shampoo": ShampooConfig(),
        "Shampoo, momentum": ShampooConfig(momentum=0.9),
        "SOAP": ShampooConfig(preconditioner="soap"),
        "KL-Shampoo": ShampooConfig(preconditioner="kl_shampoo"),
    }.items():
        items = count_items(specs, config)
        rows.append({"optimizer": name, **asdict(items), "planned": items.planned})
    for row in rows:
        row["pieces / AdamW's"] = row["pieces"] / rows[0]["pieces"]
    return rows


# ---------------------------------------------------------------------------------- planning


def planning(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds of the plan of one rank, of the coordinator, and of one rank for loading."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=_RANKS_OF_PLANS)
    rows = []
    for number in numbers:
        for name, state in (("AdamW", _shards(number)), ("Shampoo", _blocks(number))):
            rows.append({"optimizer": name, "items": number, **_plan(*state)})
    for ours, theirs in zip(rows[1::2], rows[::2], strict=True):
        ours["coordinator / AdamW's"] = ours["coordinator"] / theirs["coordinator"]
        theirs["coordinator / AdamW's"] = 1.0
    return rows


def _plan(
    state: dict[str, Any], plan_of_rank: Callable[[SavePlan, int], SavePlan]
) -> dict[str, Any]:
    planner = DefaultSavePlanner()

    def local() -> SavePlan:
        planner.set_up_planner(state, None, is_coordinator=True)
        return planner.create_local_plan()

    mine = local()
    plans = [plan_of_rank(mine, rank) for rank in range(_RANKS_OF_PLANS)]
    _, metadata = planner.create_global_plan(plans)
    return {
        "one rank": _milliseconds(local),
        "coordinator": _milliseconds(lambda: planner.create_global_plan(plans)),
        "one rank, loading": _milliseconds(lambda: create_default_local_load_plan(state, metadata)),
    }


def _milliseconds(call: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        gc.collect()
        gc.disable()  # as TorchTitan does; else it is what is measured
        start = time.process_time()  # which other processes do not change
        call()
        found.append(1e3 * (time.process_time() - start))
        gc.enable()
    return statistics.median(found)


def _shards(number: int) -> tuple[dict[str, Any], Callable[[SavePlan, int], SavePlan]]:
    """Rank 0's state dict of sharded tensors with so many items on all ranks."""
    mesh = init_device_mesh("cpu", (_RANKS_OF_PLANS,))
    local = torch.empty(1).expand(_SIDE, _SIDE)
    tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    state = {f"state.layers.{i}.weight.exp_avg": tensor for i in range(number // _RANKS_OF_PLANS)}

    def of_rank(plan: SavePlan, rank: int) -> SavePlan:
        return replace(plan, items=[_moved(item, (rank * _SIDE, 0)) for item in plan.items])

    return state, of_rank


def _blocks(number: int) -> tuple[dict[str, Any], Callable[[SavePlan, int], SavePlan]]:
    """Rank 0's state dict of parameters of 8 x 8 blocks, four entries each: a rank has every 16th
    block."""
    block, row = torch.empty(1).expand(_SIDE, _SIDE), torch.empty(1).expand(2 * _SIDE**2)
    mine = range(0, _BLOCKS**2, _RANKS_OF_PLANS)
    places = [(b // _BLOCKS * _SIDE, b % _BLOCKS * _SIDE) for b in mine]
    moment = OwnedBlocks((_BLOCKS * _SIDE, _BLOCKS * _SIDE), [(place, block) for place in places])
    matrices = OwnedBlocks((_BLOCKS**2 * len(row),), [((b * len(row),), row) for b in mine])
    entries = {
        "exp_avg": moment,
        "exp_avg_sq": moment,
        "factors": matrices,
        "inverse_roots": matrices,
    }
    state: dict[str, Tensor] = {}
    for i in range(number // (4 * _BLOCKS**2)):
        state |= {f"state.layers.{i}.weight.{entry}": value for entry, value in entries.items()}

    def of_rank(plan: SavePlan, rank: int) -> SavePlan:
        moves = {2: (rank // _BLOCKS * _SIDE, rank % _BLOCKS * _SIDE), 1: (rank * len(row),)}
        items = [_moved(item, moves[len(item.index.offset or ())]) for item in plan.items]
        return replace(plan, items=items)

    return state, of_rank


def _moved(item: WriteItem, by: tuple[int, ...]) -> WriteItem:
    assert item.tensor_data is not None and item.index.offset is not None
    offsets = torch.Size(o + b for o, b in zip(item.index.offset, by, strict=True))
    chunk = replace(item.tensor_data.chunk, offsets=offsets)
    return replace(
        item,
        index=replace(item.index, offset=offsets),
        tensor_data=replace(item.tensor_data, chunk=chunk),
    )


# ------------------------------------------------------------------------------------ saving


def _rows() -> list[Row]:
    return [
        torch_rows()[0],
        shampoo_row("Shampoo", max_preconditioner_dim=1024, exclude=ShampooConfig().exclude),
        shampoo_row("Shampoo, 256", max_preconditioner_dim=256, exclude=ShampooConfig().exclude),
        shampoo_row("Shampoo, packed", symmetric_packing=True, exclude=ShampooConfig().exclude),
        shampoo_row("SOAP", preconditioner="soap", exclude=ShampooConfig().exclude),
    ]


def saving(rows: Sequence[Row], sizes: llama.Sizes, saves: int) -> list[dict[str, Any]]:
    """Seconds and MiB of each row, and as multiples of the first one's."""
    warnings.simplefilter("ignore")
    found = [_save(row, sizes, saves) for row in rows]
    for row in found:
        for quantity in ("save s", "load s", "MiB"):
            row[f"{quantity.split()[0]} / AdamW's"] = row[quantity] / found[0][quantity]
    return found


def _save(row: Row, sizes: llama.Sizes, saves: int) -> dict[str, Any]:
    model = llama.build(sizes)
    (optimizer,) = row.build(model)
    for gradients in llama.gradient_sets(model, 1):
        for name, p in model.named_parameters():
            p.grad = gradients[name]
    optimizer.step()
    optimizer.zero_grad()

    def state() -> dict[str, Any]:
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        return {"model": get_model_state_dict(model), "optimizer": optimizer_state}

    folders = [tempfile.mkdtemp(prefix="checkpoint-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    times: dict[str, list[float]] = {"save": [], "load": []}
    for number in range(saves + 1):
        dist.barrier()
        start = time.perf_counter()
        dcp.save(state(), checkpoint_id=folder / str(number % 2))
        saved = time.perf_counter()
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / str(number % 2))
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=_FLAT)
        times["save"].append(saved - start)
        times["load"].append(time.perf_counter() - saved)
    mib = sum(f.stat().st_size for f in (folder / "0").iterdir()) / 2**20
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return {
        "optimizer": row.name,
        "save s": statistics.median(times["save"][1:]),
        "load s": statistics.median(times["load"][1:]),
        "MiB": mib,
    }


if __name__ == "__main__":
    main()
