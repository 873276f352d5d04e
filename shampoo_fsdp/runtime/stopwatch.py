"""How long the parts of a step take, without making the host wait for the device."""

import time
from collections import defaultdict

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Laps of the last step: `start()`, then `lap(part)` at the end of each part."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._parts: list[str] = []

    def start(self) -> None:
        """Begin a step, and forget the last one."""
        self._parts.clear()
        self._times.clear()
        self._mark()

    def lap(self, part: str) -> None:
        """What was done since the last lap belongs to this part."""
        self._parts.append(part)
        self._mark()

    def milliseconds(self) -> dict[str, float]:
        """Time of each part of the last step, on the device; waits for it to end."""
        result: dict[str, float] = defaultdict(float)
        for k, part in enumerate(self._parts):
            if self._on_device:
                self._events[k + 1].synchronize()
                result[part] += self._events[k].elapsed_time(self._events[k + 1])
            else:
                result[part] += 1e3 * (self._times[k + 1] - self._times[k])
        return dict(result)

    def _mark(self) -> None:
        if not self._on_device:
            self._times.append(time.perf_counter())
            return
        number = len(self._parts)
        if number == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[number].record()
