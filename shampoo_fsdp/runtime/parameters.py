"""One object per parameter; which ones cannot be trained."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.plan.assignment import Part
from shampoo_fsdp.plan.shards import ParameterSpec, placement_of

__all__ = ["describe", "local_shard"]


@dataclass(eq=False)
class Member:
    """A parameter that is trained, and all that belongs to it; handed on by reference."""

    name: str
    parameter: Tensor
    group: int
    """Number of its parameter group."""
    spec: ParameterSpec
    lr_scale: float
    """Of lr, if it is preconditioned."""
    counts: bool
    """Whether this rank counts what it does to its shard, not another replica."""
    state: dict[str, Any]
    """The optimizer's: what :meth:`show` put there, and what others did."""
    part: Part | None = None
    """What this rank does for it; None if it is not preconditioned."""
    counters: dict[str, Any] = field(init=False)
    """By what the host decides: on the CPU, wherever others may move the entries of `state`."""
    gradient: Tensor | None = None
    """This rank's shard of the gradient, while a step is taken."""
    cold: bool = False
    """Whether the step that is taken has the first refresh of its blocks."""
    stalled: bool = False
    """Whether gradients of it have been bad for so long that its weights do not decay."""
    forms: dict[str, Tensor] = field(init=False, default_factory=dict)
    """What was shown, without values: what others put there has to be like it."""
    _shown: dict[str, ReferenceType[Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.counters = {"step": _zero()}

    def precondition(self, part: Part) -> None:
        """Let it be preconditioned; before there is state."""
        self.part = part
        self.counters |= {"factor_step": _zero(), "refreshed": _zero()}

    def show(
        self, state: dict[str, Any], entries: Mapping[str, Tensor], when_gone: Callable[[Any], None]
    ) -> None:
        """Put the entries that a step works with into the optimizer's state.

        Args:
            when_gone: is called for each of them, but counters, to which nobody refers any more.
                Nothing here does.
        """
        self._shown = {
            name: ref(entry, None if name in self.counters else when_gone)
            for name, entry in entries.items()
        }
        self.forms = {n: torch.empty_like(entry, device="meta") for n, entry in entries.items()}
        self.state = state
        state.update(entries)

    def hide(self) -> None:
        """Forget what was shown, so that nothing is called for it any more."""
        self._shown = {}

    def is_shown(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the optimizer's state has these very entries; nothing is read back."""
        entries = states.get(self.parameter)
        if entries is not self.state or not self._shown:
            return False
        for name, shown in self._shown.items():
            found = entries.get(name)
            if found is None or found is not shown():  # (a reference to what is gone gives None)
                return False
        return True

    @property
    def step(self) -> int:
        """Gradients so far."""
        return int(self.counters["step"].tolist())

    @property
    def factor_step(self) -> int:
        """Of these the ones since its factors were started."""
        return int(self.counters["factor_step"].tolist())

    @property
    def refreshed(self) -> bool:
        """Whether its blocks have had their first refresh."""
        return bool(self.counters["refreshed"].tolist())

    @property
    def now(self) -> tuple[int, int, bool, bool, bool]:
        """What a step's record says of it, see :class:`shampoo_fsdp.rules.Step`."""
        active = self.gradient is not None
        return self.step, self.factor_step, active, self.refreshed, self.cold

    def shard(self) -> Tensor:
        """This rank's part of the parameter; shares its memory."""
        return local_shard(self.parameter)

    def shards(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The same of these entries of its state, and of itself as `value`."""
        return {n: local_shard(self.state[n]) for n in names} | {"value": self.shard()}

    def find_gradient(self) -> None:
        """Set `gradient` to this rank's shard of the parameter's gradient.

        Raises:
            ValueError: if it is sparse or complex.
        """
        gradient = self.parameter.grad
        self.gradient = None
        if gradient is None:
            return
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            raise ValueError(
                f"the gradient of parameter '{self.name}' is {gradient.layout} of {gradient.dtype};"
                " allowed: dense and real ones (of embeddings by sparse=False)."
            )
        placements = getattr(self.parameter, "placements", None)
        if isinstance(gradient, DTensor) and placements not in (None, gradient.placements):
            # Tensor parallelism may leave the gradient of a replicated weight as partial sums.
            gradient = gradient.redistribute(placements=placements)
        self.gradient = local_shard(gradient)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu")  # checkpoints are read into it


def find_gradients(
    members: Iterable[Member], frozen: Iterable[tuple[str, Tensor]]
) -> Exception | None:
    """Let the members find their gradients; returns the first trouble with one.

    Other ranks wait for this one, which therefore goes on with NaN in that gradient's place:
    so it is skipped everywhere, and replicas and counts of steps stay the same.
    """
    problem: Exception | None = None
    for name, parameter in frozen:
        if parameter.grad is not None:
            problem = ValueError(
                f"parameter '{name}' has a gradient but did not require one when Shampoo was "
                'built; build another one with on_mismatch = "rebuild", and load this one\'s state.'
            )
    for member in members:
        try:
            member.find_gradient()
        except Exception as error:
            problem = problem or error
            member.gradient = torch.full_like(member.shard(), torch.nan)
    return problem


def count(members: Sequence[Member], first_refresh: int) -> None:
    """Count a step of the members that have a gradient.

    Args:
        first_refresh: after how many gradients blocks get their first refresh.
    """
    for member in members:
        member.cold = False
    active = [member for member in members if member.gradient is not None]
    counters = [
        m.counters[name] for m in active for name in ("step", "factor_step") if name in m.counters
    ]
    if counters:
        torch._foreach_add_(counters, 1)
    for member in active:
        if member.part and not member.refreshed and member.factor_step >= first_refresh:
            member.cold = True
            member.counters["refreshed"].fill_(1.0)


def check_parameters(named: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raise a ValueError that names the first parameter that Shampoo cannot train."""
    name_of: dict[Tensor, str] = {}
    names = set[str]()
    for name, parameter, _ in named:
        problem = None
        if name in names:
            problem = "is there twice; names must be unique"
        elif parameter in name_of:
            problem = f"is '{name_of[parameter]}' as well (tied); give it once, under one name"
        elif getattr(parameter, "_fsdp_flattened", False):
            problem = (
                "is in a flat shard of FullyShardedDataParallel (FSDP1), which has no matrices; "
                "shard the model by fully_shard (FSDP2), or train it under DDP with `replicas`"
            )
        elif not parameter.is_floating_point():
            problem = f"is of type {parameter.dtype}; only real floating-point ones can be trained"
        elif parameter.device != named[0][1].device:
            other, first, _ = named[0]
            problem = (
                f"is on {parameter.device} but '{other}' on {first.device}; allowed: one device"
            )
        if problem:
            raise ValueError(f"parameter '{name}' {problem}.")
        names.add(name)
        name_of[parameter] = name


def refuse_offloaded(named: Iterable[tuple[str, Tensor, int]]) -> None:
    """Raise a ValueError that names the first parameter that FSDP2 keeps on the CPU beside GPUs.

    On a mesh of one rank it is a warning: TorchTitan makes seed checkpoints so, without a step.
    """
    for name, parameter, _ in named:
        if not isinstance(parameter, DTensor) or parameter.device.type != "cpu":
            continue
        if (device := parameter.device_mesh.device_type) != "cpu":
            problem = (
                f"parameter '{name}' is on the CPU and its mesh on '{device}' (CPU offload): write "
                "fully_shard(..., offload_policy=OffloadPolicy()), in TorchTitan "
                "training.enable_cpu_offload = false; or, to work on the CPU, root_method = 'eigh'."
            )
            if parameter.device_mesh.size() > 1:
                raise ValueError(problem)
            warnings.warn(problem, stacklevel=4)
            return


def refuse_moved(members: Iterable[Member], device: torch.device) -> None:
    """Raise a ValueError that names the first parameter that has left the device of its state, or
    is not real any more."""
    for member in members:
        parameter = member.parameter
        if parameter.device != device or not parameter.is_floating_point():
            raise ValueError(
                f"parameter '{member.name}' is of {parameter.dtype} on {parameter.device} now, but "
                f"its state is for a real one on {device}: build Shampoo anew and "
                "load_state_dict()."
            )


def describe(name: str, parameter: Tensor, replicas: dist.ProcessGroup | None) -> ParameterSpec:
    """What the planner needs to know of a parameter.

    Args:
        replicas: where plain tensors are replicated; without it this rank trains them alone.

    Raises:
        ValueError: names a DTensor whose mesh dimensions cut one of its dimensions in another order
            than theirs, without saying so in its placements.
    """
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        # Not every version of torch has it, and it is None where placements say all.
        for dim, order in getattr(parameter._spec, "shard_order", None) or ():
            if list(order) != sorted(order):
                raise ValueError(
                    f"dimension {dim} of parameter '{name}' is sharded by mesh dimensions "
                    f"{tuple(order)} in this order; allowed: ascending (or _StridedShard)."
                )
        mesh = parameter.device_mesh
        ranks = tuple(mesh.mesh.flatten().tolist())
        placements = tuple(map(placement_of, parameter.placements))
        return ParameterSpec(name, shape, ranks, tuple(mesh.shape), placements)
    if replicas is not None:
        ranks = tuple(dist.get_process_group_ranks(replicas))
    else:
        ranks = (dist.get_rank() if dist.is_initialized() else 0,)
    return ParameterSpec(name, shape, ranks, (len(ranks),), (None,))


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the plain tensor itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
