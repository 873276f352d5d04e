"""Which initial lr a parameter group has after a checkpoint: this job's or the checkpoint's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Resumed", "before_loading"]

# Of lr from one step to the next, as a factor: more than that is another schedule.
_LARGEST_STEP = 2.5


@dataclass
class Resumed:
    """A group whose initial lr is another one in the checkpoint than here.

    Either may be the one that its schedule goes on from: torch's schedulers keep theirs, this
    job's, unless they load their own state, and say nothing of it.
    """

    group: dict[str, Any]
    own: float
    """The initial lr of this job."""
    scheduled: bool
    """Whether a scheduler had been built for the group before it was loaded."""
    saved: float = 0.0
    """The initial lr of the checkpoint, which the group has until it is settled."""
    loaded: float = 0.0
    """The lr of the checkpoint."""
    steps: int = 0

    def note_loaded(self) -> bool:
        """Note what has been loaded into the group; whether that leaves its initial lr open."""
        self.loaded = float(self.group["lr"])
        self.saved = float(self.group.get("initial_lr", self.loaded))
        self.steps = 0
        if self.scheduled:
            self.group.setdefault("initial_lr", self.saved)
        differs = "initial_lr" in self.group and self.own != self.saved
        return differs and min(self.own, self.saved) > 0.0

    def settled(self, steps: int) -> bool:
        """Whether the initial lr is. If the lr of the first two steps is another than the loaded
        one, it is that for which the schedule goes on where it was; if it does for neither, that of
        the scheduler that was built.

        Args:
            steps: that are taken with the lr that the group has now.
        """
        lr = float(self.group["lr"])
        self.steps += steps
        if lr == self.loaded or min(lr, self.loaded) <= 0.0:
            return self.steps == 2
        steps_to = {
            initial: abs(math.log(lr / initial) - math.log(self.loaded / self.saved))
            for initial in (self.saved, self.own)
        }
        nearest = min(steps_to, key=steps_to.__getitem__)
        if steps_to[nearest] > math.log(_LARGEST_STEP):
            nearest = self.own if self.scheduled or lr == self.own else self.saved
        self.group["initial_lr"] = nearest
        return True


def before_loading(groups: Sequence[dict[str, Any]], open_: Iterable[Resumed]) -> list[Resumed]:
    """What this job has in its groups, or had before what was loaded and is not settled."""
    known = {id(resumed.group): resumed for resumed in open_}
    return [
        known.get(id(g))
        or Resumed(g, float(g.get("initial_lr", g["lr"])), scheduled="initial_lr" in g)
        for g in groups
    ]
