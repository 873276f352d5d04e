"""Which gradients travel together, what a step does with them, and how long its parts take."""

import dataclasses
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.assignment import OwnedBlock, Part
from shampoo_fsdp.rules.matrices import on_device
from shampoo_fsdp.rules.rule import Step
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.runtime.exchange import Exchange
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet

__all__ = ["Stopwatch"]

_BUCKET_ELEMENTS = 84 * 2**20
"""A rank's share of the gradients of one bucket, where `buckets` is not set: 336 MiB in fp32."""

_BUCKET_ELEMENTS_ALONE = 256 * 2**20
"""The same where nothing travels beside the work, 1 GiB: each stack of each bucket has kernels of
its own; with nine buckets in the place of three a GPU waited for the host a third of the time."""

_ROW_WIDTHS = (64, 8, 1)
"""In elements. A row has four numbers of 4 bytes: next to nothing, 2 bytes per element, or 16."""


class Stopwatch:
    """How long the parts of the last step took, without making the host wait for the device:
    `start()`, then `lap(part)` at the end of each part."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a step, and forget the last one."""
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """What was done since the last lap belongs to this part."""
        self._marks.append((part, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Time of each part of the last step, on the device; waits for it to end."""
        result: dict[str, float] = defaultdict(float)
        for (_, start), (part, end) in itertools.pairwise(self._marks):
            if self._on_device:
                end.synchronize()
            result[part] += start.elapsed_time(end) if self._on_device else 1e3 * (end - start)
        return dict(result)

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Bucket:
    """Some preconditioned parameters of a team, whose gradients and updates travel together."""

    def __init__(
        self,
        parts: Mapping[Member, Part],
        ranks: RankSet,
        config: ShampooConfig,
        workspace: Tensor,
        travels: bool,
        name: str,
    ) -> None:
        """
        Args:
            parts: the parameters, and what this rank has to do for them.
            ranks: those of the plan.
            workspace: that all buckets compute in; fp32, of :func:`elements` numbers at least.
            travels: whether any rank of the plan sends anything.
            name: for warnings.
        """
        self.members = list(parts)
        self.ranks = ranks.ranks
        """That share its blocks."""
        self._shapes = [part.shard_shape for part in parts.values()]
        self._config = config
        self._workspace = workspace[: elements(parts)]
        alike = defaultdict(list)
        for member, part in parts.items():
            for block in part.blocks:
                alike[member.group, block.shape].append((member, block))
        self.stacks: dict[BlockStack, list[tuple[Member, OwnedBlock]]] = {}
        """Each has blocks of one shape, of parameters of one group: with whose they are."""
        starts: dict[OwnedBlock, int] = {}
        start = 0
        for (_, shape), owned in sorted(alike.items(), key=lambda entry: entry[0]):
            owned.sort(key=lambda pair: pair[1].phase)
            size, phases = math.prod(shape), [block.phase for _, block in owned]
            memory = self._workspace[start : start + len(owned) * size].view(len(owned), *shape)
            self.stacks[BlockStack(shape, phases, config, memory)] = owned
            for _, block in owned:
                starts[block] = start
                start += size
        self._exchange = Exchange(parts, starts, ranks, config, workspace.device, travels, name)

    def saved(self) -> Iterator[tuple[Member, OwnedBlock, dict[str, Tensor]]]:
        """The state of each block that this rank owns, by name, as checkpoints have it; made anew
        where it was released."""
        for stack, owned in self.stacks.items():
            if not stack.saved:
                stack.allocate()
            for k, (member, block) in enumerate(owned):
                yield member, block, {name: stacked[k] for name, stacked in stack.saved.items()}

    def begin(self, stack: BlockStack, groups: Sequence[GroupSettings]) -> Step:
        """The record of a step of one of its stacks; `groups` are those of the optimizer."""
        members = [member for member, _ in self.stacks[stack]]
        now = {member: member.now for member in dict.fromkeys(members)}
        blocks = zip(*(now[member] for member in members), strict=True)
        return stack.begin(Step(groups[members[0].group], *blocks))

    def step(self, groups: Sequence[GroupSettings], watch: Stopwatch) -> Iterator[None]:
        """Take a step, up to the next yield at a time; see `Parameters._take_steps`.

        Args:
            groups: of the optimizer.
            watch: measures the parts.

        Yields:
            where the caller may work on other buckets. From the second to the fourth yield the
            workspace is this bucket's.
        """
        self._exchange.send_gradients(self._gradients(groups))
        watch.lap("exchange")
        yield  # gradients travel
        self._exchange.receive_gradients(self._workspace)
        yield
        watch.lap("exchange")
        steps = {stack: self.begin(stack, groups) for stack in self.stacks}
        for stack, step in steps.items():
            stack.accumulate(step)
            watch.lap("factors")
            stack.refresh(step)
            watch.lap("roots")
        yield
        for stack, step in steps.items():
            stack.direct(step)
        watch.lap("direction")
        self._exchange.pack_updates(self._workspace)
        watch.lap("exchange")
        yield
        self._exchange.send_updates()
        yield  # updates travel
        updates = self._exchange.receive_updates(self.members[0].parameter.dtype)
        watch.lap("exchange")
        self._apply(updates, groups)
        watch.lap("apply")

    def _gradients(self, groups: Sequence[GroupSettings]) -> list[Tensor | None]:
        """The members' gradients in the shape of their views, with L2 decay."""
        # Unlike a parameter's shard, a gradient may be copied, if it is not dense.
        gradients = [
            None if (g := member.gradient) is None else g.reshape(shape)
            for member, shape in zip(self.members, self._shapes, strict=True)
        ]
        if self._config.weight_decay_type == "l2":
            for settings, active, shards in self._active(groups):
                if decay := settings.weight_decay:
                    dense = [g for k in active if (g := gradients[k]) is not None]
                    alike = [w.reshape(g.shape) for w, g in zip(shards, dense, strict=True)]
                    total = torch._foreach_add(dense, alike, alpha=decay)
                    for k, sum_ in zip(active, total, strict=True):
                        gradients[k] = sum_
        return gradients

    def _apply(self, updates: Sequence[Tensor], groups: Sequence[GroupSettings]) -> None:
        """W <- (1 - decay) W - lr D on this rank's shards."""
        for settings, active, shards in self._active(groups):
            # (Not the other way round: others may have given a shard other strides.)
            alike = [updates[k].view(w.shape) for k, w in zip(active, shards, strict=True)]
            descend(shards, alike, settings.lr, settings.lost)

    def state_was_loaded(self) -> None:
        """Start the factors anew of parameters whose factors have seen no gradient."""
        for stack, owned in self.stacks.items():
            if anew := [b for b, (member, _) in enumerate(owned) if member.factor_step == 0]:
                stack.rule.restart(on_device(anew, stack.device, torch.int64))

    def _active(
        self, groups: Sequence[GroupSettings]
    ) -> Iterator[tuple[GroupSettings, list[int], list[Tensor]]]:
        """By parameter group, and lr and decay in it, the positions of members with a
        gradient, and their shards of the parameter."""
        active: dict[tuple[int, float, bool], list[int]] = defaultdict(list)
        for k, member in enumerate(self.members):
            if member.gradient is not None:
                active[member.group, member.lr_scale, member.stalled].append(k)
        for (group, scale, stalled), chosen in active.items():
            shards = [self.members[k].shard() for k in chosen]
            own = groups[group]
            lost = 0.0 if stalled else own.lost
            yield dataclasses.replace(own, lr=scale * own.lr, lost=lost), chosen, shards


def descend(
    weights: list[Tensor], updates: list[Tensor], lr: float, lost: float, device: str = "cuda"
) -> None:
    """W <- (1 - lost) W - lr D; on a device of this type in one pass over memory, by a kernel that
    rounds less often."""
    in_one_pass = lost and lr > 1e-20  # or their ratio might be too large
    if in_one_pass and all(
        w.device.type == device and w.dtype == d.dtype and w.is_contiguous()
        for w, d in zip(weights, updates, strict=True)
    ):
        sgd(
            weights, updates, [None] * len(weights), fused=True, weight_decay=lost / lr, lr=lr,
            momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        return
    if lost:
        torch._foreach_mul_(weights, 1.0 - lost)
    torch._foreach_add_(weights, updates, alpha=-lr)


def fill_buckets(
    parts: Mapping[Member, Part], ranks: RankSet, config: ShampooConfig
) -> list[dict[Member, Part]]:
    """Which parameters travel together: neighbours, of about equal numbers of elements, and those
    apart whose rows are so narrow that they would narrow the others'."""
    alike: dict[int, list[tuple[Member, Part, int]]] = defaultdict(list)
    for member, part in parts.items():
        width = next(width for width in _ROW_WIDTHS if part.row_width % width == 0)
        alike[width].append((member, part, math.prod(member.spec.shape)))
    everything = sum(size for like in alike.values() for _, _, size in like)
    most = _BUCKET_ELEMENTS if len(ranks.ranks) > 1 else _BUCKET_ELEMENTS_ALONE
    buckets = []
    for _, like in sorted(alike.items(), reverse=True):
        total = sum(size for _, _, size in like)
        number = math.ceil(total / len(ranks.ranks) / most)
        if config.buckets:
            number = max(1, round(config.buckets * total / everything))
        chosen: dict[int, dict[Member, Part]] = defaultdict(dict)
        passed = 0
        for member, part, size in like:
            chosen[min(passed * number // total, number - 1)][member] = part
            passed += size
        buckets += [chosen[k] for k in sorted(chosen)]
    return buckets


def elements(parts: Mapping[Member, Part]) -> int:
    """How many numbers the blocks have that this rank owns."""
    return sum(math.prod(block.shape) for part in parts.values() for block in part.blocks)
