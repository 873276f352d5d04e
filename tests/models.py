"""A tiny Llama's parameters under every layout, and gradients that are the same on all of them.

    model, mesh = build("tp_fsdp")               # on 4 ranks
    optimizer = Shampoo(model.named_parameters(), ...)
    gradients = deterministic_gradients(model, step=1)
    set_gradients(model, gradients)              # each rank takes its part; no communication
    optimizer.step()
    full_parameters(model)                       # plain tensors, to compare

Parameters have TorchTitan's names and placements; the model has no forward pass, which no test of
an optimizer needs.
"""

import itertools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shampoo_fsdp import Shampoo

SMALL = {"dim": 12, "hidden": 20, "vocab": 16, "n_layers": 1}
"""Sizes for tests that look at few parameters, or are slow."""


# ------------------------------------------------------------------------------- model


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        half = dim // 2  # grouped queries
        shapes = {"wq": (dim, dim), "wk": (dim, half), "wv": (dim, half), "wo": (dim, dim)}
        self.attention = _linears(shapes)
        up, down = (dim, hidden), (hidden, dim)
        self.feed_forward = _linears({"w1": up, "w2": down, "w3": up})
        self.attention_norm = nn.RMSNorm(dim)
        self.ffn_norm = nn.RMSNorm(dim)


def _linears(shapes: dict[str, tuple[int, int]]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class TinyLlama(nn.Module):
    """Llama's parameters, named as TorchTitan names them."""

    def __init__(
        self, *, dim: int = 24, hidden: int = 52, vocab: int = 40, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleDict(
            {str(i): _TransformerBlock(dim, hidden) for i in range(n_layers)}
        )
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            noise = torch.randn(p.shape, generator=_generator(name), dtype=torch.float64)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 else 0.02 * noise)


# ----------------------------------------------------------------------------- layouts


class Built(NamedTuple):
    """A model and its mesh: None for "single", the mesh of replicas for "ddp"."""

    model: TinyLlama
    mesh: DeviceMesh | None


def build(layout: str, *, dtype: torch.dtype = torch.float32, **sizes: int) -> Built:
    """Make the model with the same values on every layout.

    Args:
        layout: "single" (plain tensors), "ddp" (the same, with the mesh of the ranks that hold
            them), "fsdp" (all ranks), "hsdp" (2 replicas), "tp" (all ranks) or "tp_fsdp" (TP of 2
            within FSDP, as TorchTitan does). hsdp and tp_fsdp need an even number of ranks.
        dtype: of the parameters.
        sizes: of :class:`TinyLlama`; the default ones divide evenly by TP, and by FSDP on 2 and 4
            ranks.
    """
    model = TinyLlama(**sizes).to(dtype)
    if layout == "single":
        return Built(model, None)
    world = dist.get_world_size()
    shape, names = {
        "ddp": ((world,), ("replica",)),
        "fsdp": ((world,), ("fsdp",)),
        "hsdp": ((2, world // 2), ("replica", "fsdp")),
        "tp": ((world,), ("tp",)),
        "tp_fsdp": ((world // 2, 2), ("fsdp", "tp")),
    }[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in names:
        _apply_tp(model, mesh["tp"])
    if "fsdp" in names:
        _apply_fsdp(model, mesh["fsdp"] if "tp" in names else mesh)
    return Built(model, mesh)


def _apply_tp(model: TinyLlama, mesh: DeviceMesh) -> None:
    """TorchTitan's plan for Llama, with sequence parallelism."""
    root = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, root)
    for block in model.layers.values():
        plan = {
            "attention_norm": SequenceParallel(),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            "feed_forward.w3": ColwiseParallel(),
        }
        parallelize_module(block, mesh, plan)


def _apply_fsdp(model: TinyLlama, mesh: DeviceMesh) -> None:
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


# --------------------------------------------------------------------------- gradients


def deterministic_gradients(
    model: nn.Module | Mapping[str, tuple[int, ...]],
    step: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Full gradients that depend on names, shapes and the step alone.

    Like a network's they are a few strong directions, whose columns stay from step to step, and
    noise: the factors get spread eigenvalues and differ from one another.

    Args:
        model: a model, or the shape of each parameter by name.
        step: any number; the same step gives the same gradients.
        dtype: of the gradients.
    """
    if isinstance(model, nn.Module):
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    else:
        shapes = {name: tuple(shape) for name, shape in model.items()}
    return {name: _gradient(name, shape, step).to(dtype) for name, shape in shapes.items()}


def _gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    rank = max(1, min(rows, columns) // 4)
    lasting, fresh = _generator(f"{name} gradient"), _generator(f"{name} gradient {step}")
    left = torch.randn(rows, rank, generator=lasting, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=fresh, dtype=torch.float64)
    noise = torch.randn(rows, columns, generator=fresh, dtype=torch.float64)
    gradient: Tensor = 1e-2 * (left @ right / rank**0.5 + 0.3 * noise)
    return gradient.reshape(shape)


def _generator(key: str) -> torch.Generator:
    # Not hash(): its value changes from process to process.
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def set_gradients(
    parameters: nn.Module | Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """Put full gradients as p.grad, for DTensors with p's mesh and placements.

    Each rank takes its own part; nothing is communicated. Parameters whose gradient is None or
    missing get none.
    """
    for name, p in _named(parameters).items():
        gradient = gradients.get(name)
        if gradient is None:
            p.grad = None
            continue
        if gradient.shape != p.shape:
            raise ValueError(f"{name}: a gradient of {tuple(gradient.shape)} for {tuple(p.shape)}")
        gradient = gradient.to(p.device, p.dtype)
        if isinstance(p, DTensor):
            p.grad = DTensor.from_local(
                local_part(gradient, p),
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        else:
            p.grad = gradient.clone()


def with_shampoo(
    layout: str, sizes: Mapping[str, int] | None = None, **settings: Any
) -> tuple[Built, Shampoo]:
    """A model by `build`, and its optimizer; under "ddp" replicas share the work."""
    built = build(layout, **(sizes or {}))
    replicas = built.mesh if layout == "ddp" else None
    return built, Shampoo(built.model.named_parameters(), replicas=replicas, **settings)


def train(model: nn.Module | Built, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take these steps, with the gradients of their numbers."""
    model = model.model if isinstance(model, Built) else model
    for step in steps:
        set_gradients(model, deterministic_gradients(model, step))
        optimizer.step()


def local_part(full: Tensor, like: DTensor) -> Tensor:
    """Copy the rectangle of a full tensor that this rank's shard of a DTensor covers."""
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    if shape != tuple(like.to_local().shape):
        raise RuntimeError(
            f"{like.placements} on {like.device_mesh} mean a shard of {tuple(shape)}, but the "
            f"shard has {tuple(like.to_local().shape)}"
        )
    rectangle = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    return full[rectangle].clone()


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor as a plain one; every rank of a DTensor must call it.

    `full_tensor()` would do, but its collective, another one than those here, crashes on gloo now
    and then (torch 2.13: one of some hundred ranks ends in SIGSEGV or SIGABRT).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    mesh = tensor.device_mesh
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    pieces = [(offset, tensor.detach().to_local())]
    for dim in range(mesh.ndim):
        everyone = [pieces] * mesh.size(dim)
        dist.all_gather_object(everyone, pieces, group=mesh.get_group(dim))
        pieces = list(itertools.chain(*everyone))
    result = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
    for start, piece in pieces:
        result[tuple(slice(a, a + n) for a, n in zip(start, piece.shape, strict=True))] = piece
    return result


def full_parameters(parameters: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather copies of all parameters as plain tensors, by name; every rank must call it."""
    return {name: whole(p) for name, p in _named(parameters).items()}


def _named(parameters: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    return dict(parameters)
