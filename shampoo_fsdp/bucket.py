"""Parameters whose gradients travel together, and the stacks of their blocks on this rank."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.exchange import Exchange, Piece
from shampoo_fsdp.parameters import local_shard
from shampoo_fsdp.planner import Plan
from shampoo_fsdp.stack import BlockStack, Clock
from shampoo_fsdp.stopwatch import Stopwatch

__all__ = ["Bucket"]


class Bucket:
    """Some preconditioned parameters of a team, on their way through a step:

        send_gradients -> receive_gradients -> precondition -> send_updates -> receive_updates

    Between sending and receiving the caller may work on other buckets. All buckets compute in one
    workspace, one after the other.
    """

    def __init__(
        self,
        plan: Plan,
        chosen: Sequence[int],
        parameters: Sequence[Tensor],
        param_groups: Sequence[int],
        config: ShampooConfig,
    ) -> None:
        """
        Args:
            chosen: the parameters of this bucket, by their index in the plan.
            parameters, param_groups: of all parameters of the plan: tensors, and the numbers of
                their parameter groups.
        """
        self._plan = plan
        self.chosen = list(chosen)
        self.parameters = {p: parameters[p] for p in chosen}
        self.groups: dict[int, list[int]] = defaultdict(list)
        """The parameters of each parameter group."""
        for p in chosen:
            self.groups[param_groups[p]].append(p)
        self._device = parameters[chosen[0]].device
        self._config = config
        by_shape = defaultdict(list)
        for number, block in enumerate(plan.blocks):
            if block.parameter in self.parameters:
                by_shape[param_groups[block.parameter], block.shape].append((number, block))
        self.stacks = [
            BlockStack(blocks, param_group, config, self._device)
            for (param_group, _), blocks in sorted(by_shape.items())
        ]
        self.home = {
            number: (stack, position)
            for stack in self.stacks
            for number, position in stack.positions.items()
        }
        """Stack and position of each block, by its index in the plan."""
        self._shards_at: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of the blocks, for the workspace."""
        return sum(len(stack.phases) * math.prod(stack.shape) for stack in self.stacks)

    def bind(self, workspace: Tensor, group: dist.ProcessGroup | None) -> None:
        """Compute in this memory, of `elements` fp32 numbers at least, and exchange in this group
        of the plan's ranks."""
        self._workspace = workspace[: self.elements]
        start = 0
        for stack in self.stacks:
            shape = (len(stack.phases), *stack.shape)
            stack.gradient = workspace[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        blocks = {
            number: self.of_block(number, stack.gradient)
            for number, (stack, _) in self.home.items()
        }
        dtype = getattr(torch, self._config.communication_dtype)
        self._exchange = Exchange(self._plan, set(self.chosen), blocks, group, dtype, self._device)

    def of_block(self, number: int, stacked: Tensor) -> Tensor:
        """A block's part of a stacked tensor [B, d_1, ...], in the shape of its rectangle."""
        _, position = self.home[number]
        rectangle = self._plan.blocks[number].rectangle
        return stacked[position].view(tuple(stop - start for start, stop in rectangle))

    def send_gradients(
        self, gradients: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """
        Args:
            gradients: this rank's shard of each parameter's gradient, by its index in the plan.
            groups: the parameter groups.
        """
        self._find_shards()
        # Unlike a parameter's shard, a gradient may be copied, if it is not dense.
        self._gradients = {
            p: None if (g := gradients[p]) is None else g.reshape(self._plan.shard_shapes[p])
            for p in self.chosen
        }
        if self._config.weight_decay_type == "l2":
            for number, members in self._active():
                if decay := groups[number]["weight_decay"]:
                    shards = [self._shards[p] for p in members]
                    dense = [g for p in members if (g := self._gradients[p]) is not None]
                    total = torch._foreach_add(dense, shards, alpha=decay)
                    self._gradients.update(zip(members, total, strict=True))
        self._exchange.send_gradients(self._gradients)

    def precondition(
        self,
        groups: Sequence[Mapping[str, Any]],
        steps: Sequence[int],
        factor_steps: Sequence[int],
        watch: Stopwatch,
    ) -> None:
        """Receive the gradients, and replace them by updates.

        Args:
            groups: the parameter groups.
            steps, factor_steps: of each parameter of the plan, see :class:`Clock`.
            watch: measures the parts.
        """
        self._exchange.receive_gradients(self._gradients)
        self._round()
        watch.lap("exchange")
        for stack in self.stacks:
            owners = stack.parameters
            clock = Clock(
                [steps[p] for p in owners],
                [factor_steps[p] for p in owners],
                [self._gradients[p] is not None for p in owners],
            )
            group = groups[stack.group]
            stack.step(clock, group["betas"], group["eps"], watch)
        self._round()

    def _round(self) -> None:
        """Let what stays on this rank be as exact as what travels: no mesh decides about it."""
        dtype = getattr(torch, self._config.communication_dtype)
        if dtype != self._workspace.dtype:
            self._workspace.copy_(self._workspace.to(dtype))

    def apply_own(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """W <- (1 - decay) W - lr D on this rank's shards, where it owns the blocks itself; the
        rest of D sets out to arrive."""
        for number, members in self._active():
            if decay := weight_decay(groups[number], self._config):
                torch._foreach_mul_([self._shards[p] for p in members], 1.0 - decay)
        self._subtract(groups, self._exchange.own, self._own_targets, self._exchange.own_updates())
        self._exchange.send_updates()

    def apply_arriving(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The same where other ranks own the blocks, without weight decay."""
        updates = self._exchange.receive_updates()
        self._subtract(groups, self._exchange.arriving, self._arriving_targets, updates)
        self._exchange.forget_updates()
        self._gradients = {}  # the caller may free them now

    def state_was_loaded(self, factor_steps: Sequence[int], refreshed: Sequence[bool]) -> None:
        """Notice that the stacks' state has changed.

        Args:
            factor_steps: of each parameter of the plan; where it is zero, factors are started anew.
            refreshed: whether the blocks of each parameter have had their first refresh.
        """
        for stack in self.stacks:
            anew = [b for b, p in enumerate(stack.parameters) if factor_steps[p] == 0]
            if anew:
                stack.restart_factors(anew)
            stack.set_rooted([refreshed[p] for p in stack.parameters])

    def _subtract(
        self,
        groups: Sequence[Mapping[str, Any]],
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],
        updates: Sequence[Tensor],
    ) -> None:
        for number, members in self._active():
            chosen = set(members)
            which = [k for k, (p, _) in enumerate(pieces) if p in chosen]
            if which:
                torch._foreach_add_(
                    [targets[k] for k in which],
                    [updates[k] for k in which],
                    alpha=-groups[number]["lr"],
                )

    def _active(self) -> list[tuple[int, list[int]]]:
        """Parameters with a gradient, by parameter group."""
        active = [
            (number, [p for p in members if self._gradients[p] is not None])
            for number, members in self.groups.items()
        ]
        return [(number, members) for number, members in active if members]

    def _find_shards(self) -> None:
        """Views of the pieces of the shards; made again only if the shards have moved."""
        shards = {p: local_shard(parameter) for p, parameter in self.parameters.items()}
        at = tuple(shard.data_ptr() for shard in shards.values())
        if at == self._shards_at:
            return
        self._shards_at = at
        self._shards = {p: s.view(self._plan.shard_shapes[p]) for p, s in shards.items()}
        self._own_targets = [self._shards[p][slices] for p, slices in self._exchange.own]
        self._arriving_targets = [self._shards[p][slices] for p, slices in self._exchange.arriving]


def weight_decay(group: Mapping[str, Any], config: ShampooConfig) -> float:
    """The share of its weights that a group loses on a step."""
    if config.weight_decay_type == "l2":
        return 0.0
    if config.weight_decay_type == "independent":
        lr, initial = group["lr"], group.get("initial_lr", group["lr"])
        return float(group["weight_decay"] * (lr / initial if initial else 1.0))
    return float(group["lr"] * group["weight_decay"])
