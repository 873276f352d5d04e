"""A step that waits long for other ranks says so, once for each wait, and goes on waiting.

A thread looks at what is waited for, while something is; neither host nor device waits for it.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger

import torch

_logger = getLogger(__name__)

_PAUSE = 1.0  # seconds between two looks, at most


@dataclass(eq=False)
class _Wait:
    patience: Callable[[], float]
    message: Callable[[float], str]
    began: float = field(default_factory=time.monotonic)
    ended: Callable[[], bool] = lambda: False
    told: bool = False


_lock = threading.Lock()
_waits: deque[_Wait] = deque()
"""In the order in which they end."""
_looking = False
"""Whether the thread runs."""


@contextmanager
def told_if_long(
    device: torch.device, patience: Callable[[], float], message: Callable[[float], str]
) -> Iterator[None]:
    """Around what makes the host wait or, on CUDA, the current stream.

    Args:
        patience: says after how many seconds a warning is logged.
        message: makes it of the seconds that have passed.
    """
    global _looking
    wait = _Wait(patience, message)
    with _lock:
        while _waits and _waits[0].ended():  # here, as memory that CUDA knows is freed with it
            _waits.popleft()
        _waits.append(wait)
        if not _looking:
            _looking = True
            threading.Thread(target=_look, name="shampoo_fsdp stalls", daemon=True).start()
    try:
        yield
    finally:
        wait.ended = _arrival(device) if device.type == "cuda" else lambda: True


def _arrival(device: torch.device) -> Callable[[], bool]:
    """Tells whether the current stream has come to this place. The device writes a byte of the
    host's memory: another thread must not ask CUDA while a graph may be captured."""
    arrived = torch.zeros(1, dtype=torch.uint8, device="cpu", pin_memory=True)
    arrived.copy_(_one(device), non_blocking=True)
    return lambda: arrived.tolist() == [1]


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.uint8, device=device)


def _look() -> None:
    global _looking
    pause = _PAUSE
    while True:
        time.sleep(pause)
        with _lock:
            oldest = next((wait for wait in _waits if not wait.ended()), None)
            if oldest is None:
                _looking = False
                return
        passed, patience = time.monotonic() - oldest.began, oldest.patience()
        if passed >= patience and not oldest.told:
            oldest.told = True
            _logger.warning(oldest.message(passed))
        pause = min(_PAUSE, patience / 4)
