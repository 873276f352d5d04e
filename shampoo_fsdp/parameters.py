"""What the optimizer is given: names, shards and meshes of parameters, and the ranks they share."""

import dataclasses
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shampoo_fsdp.blocks import is_matrix, view_dims
from shampoo_fsdp.config import ShampooConfig, check_torch_options
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
    "plain_name",
    "process_group",
    "refuse_frozen",
    "refuse_moved",
    "warning_without_names",
]

Replicas = DeviceMesh | dist.ProcessGroup | None

# Wrappers (torch.compile, activation checkpointing, DDP) put these into names; a parameter is the
# same one with and without them.
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+|_orig_mod\.|_checkpoint_wrapped_module\.")


def named_param_groups(params: Iterable[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameter groups as torch.optim wants them, and the name of each parameter in their order.

    Groups of named parameters have the names, as they were given, in `param_names`.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, which may also bring
            `param_names`. Parameters without a name are named by their position.

    Raises:
        TypeError, ValueError: what is no parameter, a setting that groups cannot have, or that
            only some parameters have names.
    """
    if isinstance(params, set | Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, and "
            f"ordered, such as model.named_parameters(); found a {type(params).__name__}."
        )
    entries = list(params)
    if not entries:
        raise ValueError("the optimizer got an empty parameter list (a used-up generator?).")
    if not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    members = []
    for entry in entries:
        _check_group(entry)
        members.append(_members(entry))
    _refuse_names_for_some(members)
    groups: list[dict[str, Any]] = []
    for entry, own in zip(entries, members, strict=True):
        group = {**entry, "params": [tensor for _, tensor in own]}
        group.pop("param_names", None)
        if any(name is not None for others in members for name, _ in others):
            group["param_names"] = [name for name, _ in own]
        groups.append(group)
    names = [name for own in members for name, _ in own]
    return groups, [str(i) if name is None else plain_name(name) for i, name in enumerate(names)]


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return _WRAPPERS.sub("", name)


def _members(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """The parameters of a group, with their names if they have some."""
    params, names = group["params"], group.get("param_names")
    if isinstance(params, set) or not isinstance(params, Iterable):
        raise TypeError(
            f"the params of a parameter group are a {type(params).__name__}; allowed: a list of "
            "parameters or of pairs (name, parameter)."
        )
    params = [params] if isinstance(params, Tensor) else list(params)
    if names is None:
        names = [None] * len(params)
    elif (
        not isinstance(names, list | tuple)
        or len(names) != len(params)
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(
            f"the 'param_names' of a parameter group are {reprlib.repr(names)}; allowed: a list "
            f"with one name for each of its {len(params)} parameters."
        )
    found: list[tuple[str | None, Tensor]] = []
    for name, member in zip(names, params, strict=True):
        pair = member if isinstance(member, tuple) else (name, member)
        if (
            len(pair) != 2
            or not isinstance(pair[1], Tensor)
            or not isinstance(pair[0], str if pair is member else str | None)
        ):
            kinds = ", ".join(type(part).__name__ for part in pair)
            raise TypeError(
                "expected a parameter or a pair (name, parameter), found "
                + (f"({kinds})." if pair is member else f"{type(member).__name__}.")
            )
        found.append(pair)
    return found


def _refuse_names_for_some(groups: Sequence[Sequence[tuple[str | None, Tensor]]]) -> None:
    """As torch.optim does, in its words."""
    unnamed = [tensor for group in groups for name, tensor in group if name is None]
    if len(unnamed) in (0, sum(map(len, groups))):
        return
    found = f"the parameter of shape {tuple(unnamed[0].shape)} has no name, but others have."
    kinds = [{name is not None for name, _ in group} for group in groups if group]
    if {True, False} in kinds:
        raise ValueError(
            "all optimizer params should be with/without names. Some param names are missing: "
            + found
        )
    raise ValueError(
        "all optimizer param groups should be with/without names. cannot add param group "
        f"{'without' if kinds[0] == {True} else 'with'} names to the optimizer: {found}"
    )


def warning_without_names(parameters: int, shapes: Sequence[tuple[int, ...]]) -> str:
    """What to say where all matrices are preconditioned because none has a name.

    Args:
        parameters: how many there are.
        shapes: of the matrices that are preconditioned.
    """
    # The largest first: embeddings are among them.
    kinds = sorted(Counter(shapes).items(), key=lambda kind: -math.prod(kind[0]))
    said = ", ".join(f"{shape} x {number}" for shape, number in kinds[:4])
    more = len(kinds) - 4
    rest = f" and {more} more shape{'s' if more > 1 else ''}" if more > 0 else ""
    return (
        f"{parameters} parameters have no names, so that Shampoo cannot tell embeddings and the "
        f"output layer apart and preconditions {len(shapes)} matrices: {said}{rest}. Build it with "
        "model.named_parameters(), or with exclude=[] if that is meant."
    )


def _check_group(entry: Any) -> None:
    if not isinstance(entry, dict) or "params" not in entry:
        raise TypeError(f"expected a parameter group with the key 'params', found {entry!r}.")
    for field in dataclasses.fields(ShampooConfig):
        if field.name in entry:
            raise ValueError(
                f"setting '{field.name}' is the same for all parameters: give it to Shampoo, not "
                "to a parameter group."
            )
    check_torch_options(entry)


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


def refuse_moved(names: Sequence[str], parameters: Sequence[Tensor], device: torch.device) -> None:
    """Raise a ValueError that names the first parameter that has left the device of its state, or
    is not real any more."""
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.device != device:
            raise ValueError(
                f"parameter '{name}' is on {parameter.device}, but was on {device} when Shampoo "
                "was built, and its state still is; build it again and load_state_dict() the old "
                "one's state_dict()."
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter '{name}' is of type {parameter.dtype} now; only real floating-point "
                "parameters can be trained: build Shampoo again with such ones, and "
                "load_state_dict()."
            )


def is_preconditioned(name: str, shape: Sequence[int], config: ShampooConfig) -> bool:
    """Whether Shampoo preconditions a parameter; the grafted method alone updates it otherwise."""
    if not shape or math.prod(shape) == 0 or any(re.search(p, name) for p in config.exclude):
        return False
    if config.precondition_1d:
        return True
    dims, batch_dims = view_dims(shape, config)
    view = [math.prod(shape[d] for d in group) for group in dims[batch_dims:]]
    # A small matrix that is merged has one factor for all, and is still no vector.
    return is_matrix(shape if config.merge_dims == "small" and not batch_dims else view)


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
                "built, so that it has no state; build another optimizer after unfreezing, with "
                'on_mismatch = "rebuild", and load the state_dict() of this one into it.'
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
