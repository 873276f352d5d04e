"""The order in which a step's buckets travel and are computed."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.runtime.bucket import Bucket
from shampoo_fsdp.runtime.exchange import allocate, release
from shampoo_fsdp.runtime.stopwatch import Stopwatch

__all__ = ["take_steps"]


def take_steps(
    buckets: Sequence[Bucket],
    workspace: Tensor,
    groups: Sequence[GroupSettings],
    watch: Stopwatch,
    meanwhile: Callable[[], None],
) -> None:
    """Take the step of all buckets; all ranks do so in this order.

    While something travels, something else is computed: what `meanwhile` does; the first half of a
    bucket's work, while the last one's updates travel; the second half, while the next one's
    gradients do. More at once would only take more memory. When no gradients are to come any more,
    the last but one's updates may travel longer instead.

    Args:
        workspace: that all buckets compute in; has memory within this call only.
        groups: of the optimizer.
        watch: measures the parts.
    """
    for bucket in buckets[:1]:
        bucket.send_gradients(groups)
    watch.lap("exchange")
    meanwhile()
    watch.lap("excluded")
    allocate(workspace)
    unfinished, held = list[Bucket](), list[Bucket]()
    for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
        bucket.receive_gradients()
        for last in held:
            last.send_updates()
        held.clear()
        if following and not unfinished:
            following.send_gradients(groups)
        watch.lap("exchange")
        steps = bucket.accumulate(groups, watch)
        if following and unfinished:
            unfinished.pop().apply_updates(groups, watch)
            following.send_gradients(groups)
            watch.lap("exchange")
        bucket.direct(steps, watch)
        unfinished.append(bucket)
        # Updates wait until memory of the next gradients is free. Not where these come from other
        # ranks: they may be waiting for such updates before they send.
        if following is None or following.ranks == bucket.ranks:
            held.append(bucket)
        else:
            bucket.send_updates()
    release(workspace)
    for last in held:
        last.send_updates()
    for last in unfinished:
        last.apply_updates(groups, watch)
