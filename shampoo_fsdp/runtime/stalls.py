"""A step that waits long for other ranks says so, once for each wait, and goes on waiting.

A thread looks at what is waited for, while something is; neither host nor device waits for it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger

import torch

__all__ = ["told_if_long"]

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


@contextmanager
def told_if_long(
    device: torch.device, patience: Callable[[], float], message: Callable[[float], str]
) -> Iterator[None]:
    """Around what makes the host wait or, on CUDA, the current stream.

    Args:
        patience: says after how many seconds a warning is logged.
        message: makes it of the seconds that have passed.
    """
    wait = _Wait(patience, message)
    with _lock:
        if not _waits:
            threading.Thread(target=_look, name="shampoo_fsdp stalls", daemon=True).start()
        _waits.append(wait)
    try:
        yield
    finally:
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            wait.ended = event.query
        else:
            wait.ended = lambda: True


def _look() -> None:
    pause = _PAUSE
    while True:
        time.sleep(pause)
        with _lock:
            while _waits and _waits[0].ended():
                _waits.popleft()
            if not _waits:
                return
            oldest = _waits[0]
        passed, patience = time.monotonic() - oldest.began, oldest.patience()
        if passed >= patience and not oldest.told:
            oldest.told = True
            _logger.warning(oldest.message(passed))
        pause = min(_PAUSE, patience / 4)
