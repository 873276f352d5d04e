"""Trainings that are drawn: on some mesh, saved in the middle, and gone on with on another.

At the end the parameters are those of one process that was never interrupted. How far rounding may
move them depends on the case (SOAP's bases are not determined where gradients lack rank): it is
measured, by training in one process again with gradients that are a little off.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from tests.distributed.cases import LAYOUTS, Case, draw
from tests.models import full_parameters, set_gradients
from tests.ranks import run_ranks
from tests.shampoo_fsdp.test_state import move

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 5e-2}
"""Of a parameter's whole update, where rounding is not magnified, by the parameter's type. (CPUs
round the last numbers of a bf16 tensor otherwise than those before: shards differ.)"""
TOLERANCE_IN_BF16 = 1e-3
"""Where state or messages are in bf16: a number next to the middle of two is rounded either way."""
TIMES_ROUNDING = 10.0
DIMS = {"hsdp": ("replica", "fsdp"), "tp_fsdp": ("fsdp", "tp")}


def test_what_is_drawn_trains_alike_on_all_meshes(request: pytest.FixtureRequest, tmp_path: Path):
    cases = [draw(number) for number in request.config.getoption("--fuzz")]
    found = run_ranks(4, train_all, cases=cases, folder=tmp_path, timeout=600.0 + 30 * len(cases))
    problems, loose = [], 0
    for i, case in enumerate(cases):
        expected, allowed = alone(case)
        loose += max(allowed.values()) > 0.05
        if problem := difference(case, expected, allowed, [of_rank[i] for of_rank in found]):
            problems.append(f"--fuzz {case.number}:{case.number + 1}: {problem}\n{case}")
    assert not problems, f"{len(problems)} of {len(cases)} cases:\n" + "\n\n".join(problems[:5])
    assert loose <= 1 + len(cases) / 10


Result = tuple[dict[str, Tensor] | None, list[int], list[int]]
"""Parameters (None on ranks outside the second mesh), the steps that were refused, and how often
roots were taken, blocks and entries left out."""


def alone(case: Case) -> tuple[Result, dict[str, float]]:
    """What one process comes to, and how far each parameter may be from it, relative to its
    update."""
    exact, *others = (train_alone(case, noise) for noise in (0, 1, 2))
    start = case.start()
    in_bf16 = TOLERANCE_IN_BF16 if "bfloat16" in case.settings.values() else 0.0
    allowed = {}
    for name, value in exact[0].items():
        moved = (value - start[name]).norm().item()
        errors = [(other[0][name] - value).norm().item() for other in others]
        magnified = TIMES_ROUNDING * max(errors) / max(moved, 1e-30)
        allowed[name] = max(TOLERANCE[value.dtype], in_bf16, magnified)
    return exact, allowed


def train_alone(case: Case, noise: int) -> Result:
    parameters = {name: nn.Parameter(value) for name, value in case.start().items()}
    optimizer = case.optimizer(parameters)
    refused = take_steps(case, parameters, optimizer, range(len(case.lr)), noise)
    counters = optimizer.counters()[[0, 2, 3]].tolist()
    return {name: value.detach() for name, value in parameters.items()}, refused, counters


def take_steps(
    case: Case,
    parameters: dict[str, nn.Parameter],
    optimizer: Shampoo,
    steps: Iterable[int],
    noise: int = 0,
) -> list[int]:
    """The steps that were refused."""
    refused = []
    given = [{"lr": 1e-2, **of_group}["lr"] for _, of_group in case.groups]
    for step in steps:
        gradients = case.gradients_of(step)
        if noise:
            generator = torch.Generator().manual_seed(1000 * noise + step)
            for gradient in filter(lambda g: g is not None, gradients.values()):
                size = gradient[gradient.isfinite()].square().mean().sqrt()
                off = 6e-8 * size * torch.randn(gradient.shape, generator=generator)
                gradient += torch.where(gradient == 0, 0.0, off)
        set_gradients(parameters, gradients)
        for group, lr in zip(optimizer.param_groups, given, strict=True):
            group["lr"] = lr * case.lr[step]
        try:
            optimizer.step()
        except ValueError as error:
            assert "is not finite" in str(error)
            refused.append(step)
    return refused


def difference(
    case: Case, expected: Result, allowed: dict[str, float], found: list[Result]
) -> str | None:
    """What is not as it is in one process, if anything."""
    start = case.start()
    results = [result for result in found if result[0] is not None]
    for rank, (parameters, refused, _) in enumerate(results):
        if refused != expected[1]:
            return f"rank {rank} refused steps {refused}, one process {expected[1]}"
        for name, value in expected[0].items():
            moved = max((value - start[name]).norm().item(), 1e-30)
            error = (parameters[name] - value).norm().item() / moved
            if not error <= allowed[name]:
                return f"rank {rank}: {name} is off by {error:.1e}; allowed: {allowed[name]:.1e}"
            if not torch.equal(parameters[name], results[0][0][name]):
                return f"{name} is not the same on rank {rank}"
    counted = [sum(counts) for counts in zip(*(of[2] for of in found), strict=True)]
    if counted != expected[2]:
        return f"refreshes, blocks and entries left out: {counted}, in one process {expected[2]}"
    return None


# ------------------------------------------------------------------------- on the ranks


def train_all(cases: list[Case], folder: Path) -> list[Result]:
    """One start of the ranks serves all cases; a mesh may have fewer of them."""
    meshes = {
        name: DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)
        for name, (kind, shape) in LAYOUTS.items()
        for names in [DIMS.get(kind, ("all",))]
    }
    results = []
    for case in cases:
        try:
            results.append(train(case, meshes, folder / str(case.number)))
        except Exception as error:
            raise AssertionError(f"case {case.number}:\n{case}") from error
    return results


def train(case: Case, meshes: dict[str, DeviceMesh], folder: Path) -> Result:
    steps = range(len(case.lr))
    counters = torch.zeros(3, dtype=torch.int64)

    mesh = meshes[case.source]
    if mesh.get_coordinate() is not None:
        model, optimizer = build(case, case.start(), case.source, mesh, {})
        refused = take_steps(case, dict(model.named_parameters()), optimizer, steps[: case.halt])
        counters += optimizer.counters()[[0, 2, 3]]
        weights = full_parameters(model)
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            torch.save((weights, refused), folder / "weights.pt")
        if case.moved:
            move(optimizer)
        save(case, model, optimizer, mesh, folder)
    dist.barrier()

    found, refused = torch.load(folder / "weights.pt")
    mesh = meshes[case.target]
    if mesh.get_coordinate() is None:
        return None, [], counters.tolist()
    model, optimizer = build(case, found, case.target, mesh, case.later)
    load(case, model, optimizer, mesh, folder)
    if case.moved and dist.get_rank() == 0:
        move(optimizer)
    refused += take_steps(case, dict(model.named_parameters()), optimizer, steps[case.halt :])
    counters += optimizer.counters()[[0, 2, 3]]
    return full_parameters(model), refused, counters.tolist()


def build(
    case: Case, weights: dict[str, Tensor], layout: str, mesh: DeviceMesh, settings: dict[str, Any]
) -> tuple[nn.Module, Shampoo]:
    model, kind = nn.Module(), LAYOUTS[layout][0]
    for name, value in weights.items():
        if kind in ("tp", "tp_fsdp"):
            # FSDP2 on top of tensor parallelism asks for even parts.
            dim = case.cut[name]
            uneven = dim is not None and kind == "tp_fsdp" and value.shape[dim] % 4
            placement = Replicate() if dim is None or uneven else Shard(dim)
            of_tp = mesh["tp"] if kind == "tp_fsdp" else mesh
            value = distribute_tensor(value, of_tp, [placement], src_data_rank=None)
        model.register_parameter(name, nn.Parameter(value))
    if kind in ("fsdp", "hsdp", "tp_fsdp"):
        fully_shard(model, mesh=mesh["fsdp"] if kind == "tp_fsdp" else mesh)
    parameters = dict(model.named_parameters())
    replicas = None
    if kind == "ddp":
        replicas = mesh if case.number % 2 else mesh.get_group()  # either will do
    return model, case.optimizer(parameters, replicas=replicas, **settings)


def save(case: Case, model: nn.Module, optimizer: Shampoo, mesh: DeviceMesh, folder: Path) -> None:
    if case.saved_as == "folder":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / "dcp", process_group=group_of(mesh))
        return
    if case.saved_as == "file":
        optimizer.consolidate_state_dict()
        whole = optimizer.state_dict()
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "optimizer.pt")


def load(case: Case, model: nn.Module, optimizer: Shampoo, mesh: DeviceMesh, folder: Path) -> None:
    if case.saved_as == "folder":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        group, planner = group_of(mesh), ShampooLoadPlanner()
        dcp.load(state, checkpoint_id=folder / "dcp", planner=planner, process_group=group)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    whole = torch.load(folder / "optimizer.pt", weights_only=True)
    if case.saved_as == "file":
        optimizer.load_state_dict(whole)
    else:
        spread = mesh.size() == 4  # PyTorch does so to all ranks alone
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=spread)
        given = {} if spread and dist.get_rank() else whole
        set_optimizer_state_dict(model, optimizer, given, options=options)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
