"""The same frames to many clients: most of what a gateway does."""

import os
from collections.abc import Iterable
from typing import Protocol

from daemon.core.ports import Outlet


class Recipient(Protocol):
    """What this needs of a follower."""

    @property
    def outlet(self) -> Outlet | None: ...  # noqa: D102

    def deliver(self, frames: bytes) -> None: ...  # noqa: D102


def fan_out(followers: Iterable[Recipient], frames: bytes) -> None:
    """Deliver the same frames to each follower.

    Most of them have nothing queued: then all that is left of a delivery is the call of the kernel. Each call pushes
    what belongs to the next follower out of the processor's caches, so as few objects as possible are touched.
    """
    write, size = os.write, len(frames)
    for follower in followers:
        outlet = follower.outlet
        if outlet is None or (direct := outlet.direct) < 0:
            follower.deliver(frames)
            continue
        try:
            sent = write(direct, frames)
        except OSError:  # there is no room, or the peer has gone: `deliver` meets that too, and handles it
            follower.deliver(frames)
            continue
        outlet.written += size
        if sent != size:
            outlet.enqueue(memoryview(frames)[sent:])
