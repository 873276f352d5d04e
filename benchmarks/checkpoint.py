"""Time and size of saving and loading a small model with Shampoo, beside AdamW's, on CPU ranks.

python -m benchmarks.checkpoint
"""

import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from benchmarks import llama
from benchmarks.command import console, parser_of, table
from benchmarks.ranks import run_on_ranks
from benchmarks.rows import Row, shampoo_row, torch_rows
from shampoo_fsdp import ShampooConfig

__all__ = ["main"]

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.checkpoint", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="that save")
    parser.add_argument("--dim", type=int, default=512, help="of the model that is saved")
    parser.add_argument("--saves", type=int, default=5, help="of which the median time is shown")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    options = parser.parse_args(arguments)
    sizes = llama.Sizes(dim=options.dim, ffn=options.dim * 11 // 4)
    figures = run_on_ranks(options.ranks, saving, _rows(), sizes, options.saves)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        console().print(table(f"Saving and loading on {options.ranks} ranks", figures))


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
