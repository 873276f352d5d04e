"""Which gradients travel together, and their way through a step: the stacks of their blocks."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.transfers import OwnedBlock, Part
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.rules.step import Step
from shampoo_fsdp.runtime.exchange import Exchange
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.stopwatch import Stopwatch

__all__ = ["Bucket", "OwnedStack", "elements", "fill_buckets"]

_BUCKET_ELEMENTS = 64 * 2**20
"""A rank's share of the gradients of one bucket, where `buckets` is not set: 256 MiB in fp32."""

_BUCKET_ELEMENTS_ALONE = 256 * 2**20
"""The same where nothing travels beside the work, 1 GiB: each stack of each bucket has kernels of
its own; with nine buckets in the place of three a GPU waited for the host a third of the time."""

_ROW_WIDTHS = (64, 8, 1)
"""In elements. A row has four numbers of 4 bytes: next to nothing, 2 bytes per element, or 16."""


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

    def begin(self, groups: Sequence[GroupSettings]) -> Step:
        """The record of a step; `groups` are those of the optimizer."""
        members = dict.fromkeys(self.members)
        of = {
            m: (m.step, m.factor_step, m.gradient is not None, m.refreshed, m.cold) for m in members
        }
        blocks = zip(*(of[member] for member in self.members), strict=True)
        return self.stack.begin(groups[self.group], *blocks)


class Bucket:
    """Some preconditioned parameters of a team, on their way through a step:

        send_gradients -> receive_gradients -> accumulate -> direct -> send_updates -> apply_updates

    While something is on its way the caller may work on other buckets. All buckets compute in one
    workspace, which is one's from `receive_gradients` to `direct`.
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
        self.ranks = ranks.ranks
        """That share its blocks."""
        self._shapes = [part.shard_shape for part in parts.values()]
        self._config = config
        self._workspace = workspace[: elements(parts)]
        alike = defaultdict(list)
        for member, part in parts.items():
            for block in part.blocks:
                alike[member.group, block.shape].append((member, block))
        self.stacks = []
        starts: dict[OwnedBlock, int] = {}
        start = 0
        for (_, shape), owned in sorted(alike.items(), key=lambda entry: entry[0]):
            self.stacks.append(stack := OwnedStack(owned, config, self._workspace[start:]))
            for block in stack.blocks:
                starts[block] = start
                start += math.prod(shape)
        self._exchange = Exchange(
            parts,
            starts,
            ranks,
            torch_dtype(config.communication_dtype),
            workspace.device,
            travels=travels,
        )

    def saved(self) -> Iterator[tuple[Member, OwnedBlock, dict[str, Tensor]]]:
        """The state of each block that this rank owns, by name, as checkpoints have it; made anew
        where it was released."""
        for owned in self.stacks:
            if not owned.stack.saved:
                owned.stack.allocate()
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
        self._exchange.send_gradients(gradients)

    def receive_gradients(self) -> None:
        """Fill the workspace."""
        self._exchange.receive_gradients(self._workspace)

    def accumulate(self, groups: Sequence[GroupSettings], watch: Stopwatch) -> list[Step]:
        """Let the gradients into the state; `watch` measures the parts.

        Returns:
            what :meth:`direct` needs.
        """
        steps = [owned.begin(groups) for owned in self.stacks]
        for owned, step in zip(self.stacks, steps, strict=True):
            owned.stack.accumulate(step)
            watch.lap("factors")
            owned.stack.refresh(step)
            watch.lap("roots")
        return steps

    def direct(self, steps: Sequence[Step], watch: Stopwatch) -> None:
        """Make the updates D of them, and clear the workspace."""
        for owned, step in zip(self.stacks, steps, strict=True):
            owned.stack.direct(step)
        watch.lap("direction")
        self._exchange.pack_updates(self._workspace)
        watch.lap("exchange")

    def send_updates(self) -> None:
        """Let the updates set out for the shards."""
        self._exchange.send_updates()

    def apply_updates(self, groups: Sequence[GroupSettings], watch: Stopwatch) -> None:
        """W <- (1 - decay) W - lr D on this rank's shards; where these are stalled they keep W."""
        updates = self._exchange.receive_updates()
        watch.lap("exchange")
        for settings, active, shards in self._active(groups):
            if settings.lost:
                stalled = [
                    (k, shard, shard.clone())
                    for k, shard in zip(active, shards, strict=True)
                    if self.members[k].stalled
                ]
                torch._foreach_mul_(shards, 1.0 - settings.lost)
                for k, shard, before in stalled:
                    keeps = torch.zeros(self._shapes[k], dtype=torch.bool, device=shard.device)
                    for piece in self.members[k].stalled:
                        keeps[piece] = True
                    torch.where(keeps.view(shard.shape), before, shard, out=shard)
            # (Not the other way round: others may have given a shard other strides.)
            alike = [updates[k].view(w.shape) for k, w in zip(active, shards, strict=True)]
            torch._foreach_add_(shards, alike, alpha=-settings.lr)
        watch.lap("apply")

    def state_was_loaded(self) -> None:
        """Start the factors anew of parameters whose factors have seen no gradient."""
        for owned in self.stacks:
            if anew := [b for b, member in enumerate(owned.members) if member.factor_step == 0]:
                owned.stack.restart_factors(anew)

    def _active(
        self, groups: Sequence[GroupSettings]
    ) -> Iterator[tuple[GroupSettings, list[int], list[Tensor]]]:
        """By parameter group, and lr in it, the positions of members with a gradient, and their
        shards of the parameter."""
        active: dict[tuple[int, float], list[int]] = defaultdict(list)
        for k, member in enumerate(self.members):
            if member.gradient is not None:
                active[member.group, member.lr_scale].append(k)
        for (group, scale), chosen in active.items():
            shards = [self.members[k].shard() for k in chosen]
            settings = groups[group]
            yield dataclasses.replace(settings, lr=scale * settings.lr), chosen, shards


def fill_buckets(
    parts: Sequence[tuple[Member, Part]], ranks: RankSet, config: ShampooConfig
) -> list[dict[Member, Part]]:
    """Which parameters travel together: neighbours, of about equal numbers of elements, and those
    apart whose rows are so narrow that they would narrow the others'."""
    alike: dict[int, list[tuple[Member, Part, int]]] = defaultdict(list)
    for member, part in parts:
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
