"""How long the parts of a step take, without making the host wait for the device."""

import itertools
import time
from collections import defaultdict
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Laps of the last step: `start()`, then `lap(part)` at the end of each part."""

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
