"""Which gradients travel together, and their way through a step: the stacks of their blocks."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.transfers import OwnedBlock, Part
from shampoo_fsdp.rules.clock import Clock
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.runtime.exchange import Exchange, Piece
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.stopwatch import Stopwatch

__all__ = ["Bucket", "OwnedStack", "elements", "fill_buckets"]

_BUCKET_ELEMENTS = 32 * 2**20
"""A rank's share of the gradients of one bucket, where `buckets` is not set: 128 MiB in fp32."""


class OwnedStack:
    """A stack of blocks, and whose they are."""

    def __init__(
        self, owned: Sequence[tuple[Member, OwnedBlock]], config: ShampooConfig, memory: Tensor
    ) -> None:
        """
        Args:
            owned: blocks of one shape, of parameters of one group.
            memory: at least as large.
        """
        ordered = sorted(owned, key=lambda pair: pair[1].phase)
        self.members = [member for member, _ in ordered]
        """Whose each block of the stack is."""
        self.blocks = [block for _, block in ordered]
        self.group = ordered[0][0].group
        """Number of the parameter group."""
        shape = len(ordered), *ordered[0][1].shape
        gradient = memory[: math.prod(shape)].view(shape)
        self.stack = BlockStack(shape[1:], [b.phase for b in self.blocks], config, gradient)

    def clock(self) -> Clock:
        """Where the blocks are in time."""
        members = dict.fromkeys(self.members)
        of = {
            m: (m.step, m.factor_step, m.gradient is not None, m.refreshed, m.cold) for m in members
        }
        return Clock(*zip(*(of[member] for member in self.members), strict=True))


class Bucket:
    """Some preconditioned parameters of a team, on their way through a step:

        send_gradients -> precondition -> apply_own -> apply_arriving

    Between these the caller may work on other buckets. All buckets compute in one workspace, one
    after the other.
    """

    def __init__(
        self,
        parts: Mapping[Member, Part],
        ranks: RankSet,
        config: ShampooConfig,
        workspace: Tensor,
        *,
        travels: bool,
    ) -> None:
        """
        Args:
            parts: the parameters, and what this rank has to do for them.
            ranks: those of the plan.
            workspace: fp32, of :func:`elements` numbers at least.
            travels: whether any rank of the plan sends anything.
        """
        self.members = list(parts)
        self._parts = parts
        self._config = config
        self._dtype = torch_dtype(config.communication_dtype)
        self._workspace = workspace[: elements(parts)]
        alike = defaultdict(list)
        for member, part in parts.items():
            for block in part.blocks:
                alike[member.group, block.shape].append((member, block))
        self.stacks = []
        start = 0
        for (_, shape), owned in sorted(alike.items(), key=lambda entry: entry[0]):
            self.stacks.append(OwnedStack(owned, config, self._workspace[start:]))
            start += len(owned) * math.prod(shape)
        self._exchange = Exchange(
            parts,
            {
                block: _as_rectangle(gradient, block)
                for owned in self.stacks
                for block, gradient in zip(owned.blocks, owned.stack.gradient, strict=True)
            },
            ranks,
            self._dtype,
            workspace.device,
            travels=travels,
        )
        self._gradients: dict[Member, Tensor | None] = {}
        self._shards: dict[Member, Tensor] = {}
        self._shards_at: tuple[int, ...] = ()
        self._own_targets: list[Tensor] = []
        self._arriving_targets: list[Tensor] = []

    def saved(self) -> Iterator[tuple[Member, OwnedBlock, dict[str, Tensor]]]:
        """The state of each block that this rank owns, by name, as checkpoints have it."""
        for owned in self.stacks:
            for position, (member, block) in enumerate(
                zip(owned.members, owned.blocks, strict=True)
            ):
                saved = owned.stack.saved.items()
                yield member, block, {name: stacked[position] for name, stacked in saved}

    def send_gradients(self, groups: Sequence[GroupSettings]) -> None:
        """Let the members' gradients set out for the owners of their blocks.

        Args:
            groups: of the optimizer.
        """
        self._find_shards()
        # Unlike a parameter's shard, a gradient may be copied, if it is not dense.
        self._gradients = {
            m: None if (g := m.gradient) is None else g.reshape(self._parts[m].shard_shape)
            for m in self.members
        }
        if self._config.weight_decay_type == "l2":
            for settings, active in self._active(groups):
                if decay := settings.weight_decay:
                    shards = [self._shards[m] for m in active]
                    dense = [g for m in active if (g := self._gradients[m]) is not None]
                    total = torch._foreach_add(dense, shards, alpha=decay)
                    self._gradients.update(zip(active, total, strict=True))
        self._exchange.send_gradients(self._gradients)

    def precondition(self, groups: Sequence[GroupSettings], watch: Stopwatch) -> None:
        """Receive the gradients, and replace them by updates; `watch` measures the parts."""
        self._exchange.receive_gradients(self._gradients)
        self._round()
        watch.lap("exchange")
        for owned in self.stacks:
            for part in owned.stack.step(owned.clock(), groups[owned.group]):
                watch.lap(part)
        self._round()

    def _round(self) -> None:
        """Let what stays on this rank be as exact as what travels: no mesh decides about it."""
        if self._dtype != self._workspace.dtype:
            self._workspace.copy_(self._workspace.to(self._dtype))

    def apply_own(self, groups: Sequence[GroupSettings]) -> None:
        """W <- (1 - decay) W - lr D on this rank's shards, where it owns the blocks itself; the
        rest of D sets out to arrive."""
        for settings, active in self._active(groups):
            if settings.lost:
                torch._foreach_mul_([self._shards[m] for m in active], 1.0 - settings.lost)
        self._subtract(groups, self._exchange.own, self._own_targets, self._exchange.own_updates())
        self._exchange.send_updates()

    def apply_arriving(self, groups: Sequence[GroupSettings]) -> None:
        """The same where other ranks own the blocks, without weight decay."""
        updates = self._exchange.receive_updates()
        self._subtract(groups, self._exchange.arriving, self._arriving_targets, updates)
        self._exchange.forget_updates()
        self._gradients = {}  # the caller may free them now

    def state_was_loaded(self) -> None:
        """Start the factors anew of parameters whose factors have seen no gradient."""
        for owned in self.stacks:
            if anew := [b for b, member in enumerate(owned.members) if member.factor_step == 0]:
                owned.stack.restart_factors(anew)

    def _subtract(
        self,
        groups: Sequence[GroupSettings],
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],
        updates: Sequence[Tensor],
    ) -> None:
        for settings, active in self._active(groups):
            chosen = set(active)
            which = [k for k, (member, _) in enumerate(pieces) if member in chosen]
            if which:
                torch._foreach_add_(
                    [targets[k] for k in which], [updates[k] for k in which], alpha=-settings.lr
                )

    def _active(
        self, groups: Sequence[GroupSettings]
    ) -> Iterator[tuple[GroupSettings, list[Member]]]:
        """Parameters with a gradient, by parameter group."""
        active: dict[int, list[Member]] = defaultdict(list)
        for member in self.members:
            if self._gradients[member] is not None:
                active[member.group].append(member)
        for group, members in active.items():
            yield groups[group], members

    def _find_shards(self) -> None:
        """Views of the pieces of the shards; made again only if the shards have moved."""
        shards = {member: member.shard() for member in self.members}
        at = tuple(shard.data_ptr() for shard in shards.values())
        if at == self._shards_at:
            return
        self._shards_at = at
        self._shards = {m: s.view(self._parts[m].shard_shape) for m, s in shards.items()}
        self._own_targets = [self._shards[m][slices] for m, slices in self._exchange.own]
        self._arriving_targets = [self._shards[m][slices] for m, slices in self._exchange.arriving]


def fill_buckets(
    parts: Sequence[tuple[Member, Part]], ranks: RankSet, config: ShampooConfig
) -> list[dict[Member, Part]]:
    """Which parameters travel together: neighbours, of about equal numbers of elements."""
    sizes = [math.prod(member.spec.shape) for member, _ in parts]
    total = sum(sizes)
    number = config.buckets or math.ceil(total / len(ranks.ranks) / _BUCKET_ELEMENTS)
    chosen: dict[int, dict[Member, Part]] = defaultdict(dict)
    passed = 0
    for (member, part), size in zip(parts, sizes, strict=True):
        chosen[min(passed * number // total, number - 1)][member] = part
        passed += size
    return [chosen[k] for k in sorted(chosen)]


def elements(parts: Mapping[Member, Part]) -> int:
    """How many numbers the blocks have that this rank owns."""
    return sum(math.prod(block.shape) for part in parts.values() for block in part.blocks)


def _as_rectangle(values: Tensor, block: OwnedBlock) -> Tensor:
    """A block with its batch dimensions."""
    return values.view(tuple(stop - start for start, stop in block.rectangle))
