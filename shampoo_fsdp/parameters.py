"""What the optimizer is given: names, shards and meshes of parameters, and the ranks they share."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.planner import ParameterSpec

__all__ = [
    "Replicas",
    "check_parameters",
    "check_replicas",
    "describe",
    "is_first_replica",
    "is_preconditioned",
    "local_gradient",
    "local_shard",
    "named_param_groups",
    "process_group",
    "refuse_frozen",
]

Replicas = DeviceMesh | dist.ProcessGroup | None

# Wrappers (torch.compile, activation checkpointing, DDP) put these into names; a parameter is the
# same one with and without them.
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+|_orig_mod\.|_checkpoint_wrapped_module\.")


def named_param_groups(params: Iterable[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups as torch.optim wants them, and the name of each parameter in their order.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either. Parameters without a name
            are named by their position.

    Raises:
        TypeError, ValueError: what is no parameter, or a setting that groups cannot have.
    """
    if isinstance(params, set | Tensor):
        raise TypeError(
            f"params is a {type(params).__name__}; give an ordered collection, such as "
            "model.named_parameters()."
        )
    entries = list(params)
    if not entries:
        raise ValueError("the optimizer got an empty parameter list (a used-up generator?).")
    if not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    groups: list[dict[str, Any]] = []
    names: list[str] = []
    for entry in entries:
        _check_group(entry)
        members = entry["params"]
        tensors = []
        for member in [members] if isinstance(members, Tensor) else members:
            name, tensor = member if isinstance(member, tuple) else (str(len(names)), member)
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise TypeError(
                    f"expected a parameter or a pair (name, parameter), found ({type(name)}, "
                    f"{type(tensor)})."
                )
            names.append(_WRAPPERS.sub("", name))
            tensors.append(tensor)
        groups.append({**entry, "params": tensors})
    return groups, names


def _check_group(entry: Any) -> None:
    if not isinstance(entry, dict) or "params" not in entry:
        raise TypeError(f"expected a parameter group with the key 'params', found {entry!r}.")
    for field in dataclasses.fields(ShampooConfig):
        if field.name in entry:
            raise ValueError(
                f"setting '{field.name}' is the same for all parameters: give it to Shampoo, not "
                "to a parameter group."
            )


def check_parameters(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first parameter that Shampoo cannot train."""
    seen: set[str] = set()
    name_of: dict[Tensor, str] = {}
    first = parameters[0].device if parameters else None
    for name, parameter in zip(names, parameters, strict=True):
        if name in seen:
            raise ValueError(f"two parameters are named '{name}'; names must be unique.")
        seen.add(name)
        if parameter in name_of:
            raise ValueError(
                f"'{name_of[parameter]}' and '{name}' are the same (tied) parameter; give it once, "
                "as model.named_parameters() does."
            )
        name_of[parameter] = name
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter '{name}' is of type {parameter.dtype}; only real floating-point "
                "parameters can be trained."
            )
        if parameter.is_meta:
            raise ValueError(
                f"parameter '{name}' is on the meta device; materialise the model (to_empty, "
                "then initialise) before building the optimizer."
            )
        if parameter.device != first:
            raise ValueError(
                f"parameter '{name}' is on {parameter.device} but '{names[0]}' is on {first}; all "
                "parameters must be on one device."
            )


def is_preconditioned(name: str, shape: Sequence[int], config: ShampooConfig) -> bool:
    """Whether Shampoo preconditions a parameter; the grafted method alone updates it otherwise."""
    least_order = 1 if config.precondition_1d else 2
    return (
        len(shape) >= least_order
        and math.prod(shape) > 0
        and not any(re.search(pattern, name) for pattern in config.exclude)
    )


def check_replicas(replicas: Any) -> None:
    """Raise a TypeError or ValueError if it does not say where plain tensors are replicated."""
    if not isinstance(replicas, DeviceMesh | dist.ProcessGroup | None):
        raise TypeError(f"replicas is {replicas!r}; allowed: a process group, a DeviceMesh, None.")
    if isinstance(replicas, DeviceMesh) and replicas.ndim != 1:
        raise ValueError(f"replicas is a mesh of {replicas.ndim} dimensions; allowed: one.")


def describe(name: str, parameter: Tensor, replicas: Replicas) -> ParameterSpec:
    """What the planner needs to know of a parameter.

    Args:
        replicas: where plain tensors are replicated; without it this rank trains them alone.
    """
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        ranks = tuple(mesh.mesh.flatten().tolist())
        return ParameterSpec(name, shape, ranks, tuple(mesh.shape), tuple(parameter.placements))
    if isinstance(replicas, DeviceMesh):
        ranks = tuple(replicas.mesh.flatten().tolist())
    elif replicas is not None:
        ranks = tuple(dist.get_process_group_ranks(replicas))
    else:
        ranks = (dist.get_rank() if dist.is_initialized() else 0,)
    return ParameterSpec(name, shape, ranks, (len(ranks),), (Replicate(),))


def is_first_replica(parameter: Tensor, replicas: Replicas) -> bool:
    """Whether this rank's shard is the first of those that are alike on its mesh."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        placed = zip(mesh.get_coordinate() or (), parameter.placements, strict=False)
        return all(at == 0 for at, placement in placed if isinstance(placement, Replicate))
    if isinstance(replicas, DeviceMesh):
        return replicas.get_local_rank() == 0
    return replicas is None or dist.get_rank(replicas) == 0


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the plain tensor itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(name: str, parameter: Tensor) -> Tensor | None:
    """This rank's shard of a parameter's gradient.

    Raises:
        ValueError: if it is sparse or complex.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient of parameter '{name}' is sparse ({gradient.layout}); Shampoo needs "
            "dense gradients: build the embedding with sparse=False."
        )
    if not gradient.is_floating_point():
        raise ValueError(
            f"the gradient of parameter '{name}' is of type {gradient.dtype}; allowed: real "
            "floating-point gradients."
        )
    if (
        isinstance(parameter, DTensor)
        and isinstance(gradient, DTensor)
        and gradient.placements != parameter.placements
    ):
        # Tensor parallelism may leave the gradient of a replicated weight as partial sums.
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_shard(gradient)


def refuse_frozen(frozen: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ValueError if a parameter that had no gradient when the optimizer was built has."""
    for name, parameter in frozen:
        if parameter.grad is not None:
            raise ValueError(
                f"parameter '{name}' has a gradient but did not require one when Shampoo was "
                "built, so that it has no state; build the optimizer after unfreezing."
            )


def process_group(
    ranks: tuple[int, ...], parameters: Sequence[Tensor], replicas: Replicas
) -> dist.ProcessGroup | None:
    """A group of exactly these ranks: an existing one where there is one; None for one rank."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    # Not a set: every rank must find the same one first.
    meshes = dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor))
    if isinstance(replicas, DeviceMesh):
        meshes[replicas] = None
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    if isinstance(replicas, dist.ProcessGroup):
        groups.append(replicas)
    for existing in groups:
        if tuple(dist.get_process_group_ranks(existing)) == ranks:
            return existing
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group
