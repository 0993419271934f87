"""From a client's position to the head: the one way for everybody who is behind."""

from collections.abc import Callable
from typing import Protocol

from daemon.core import wire
from daemon.core.change import Kind, Position, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.ports import EventLog
from daemon.flow.served import Served


class Reader(Protocol):
    """Who is behind, and hears what it missed."""

    async def hear(self, payloads: list[bytes]) -> None:
        """Send these frames, in order, and wait until the peer has taken most of them."""


async def replay(
    behind: dict[Topic, Seq],
    reader: Reader,
    join: Callable[[Topic], None],
    *,
    event_log: EventLog,
    hub: Hub,
    served: Served,
    chunk: int = 1000,
) -> int:
    """Send what each topic in `behind` missed since its place there, then `join` it to the live stream.

    `behind` may gain and lose topics while this runs; it is empty at the end. Returns how many changes were sent.
    Memory is bounded by one chunk. Raises LogUnavailable.
    """
    sent = 0
    while behind:
        upto = hub.position.seq
        for topic in [topic for topic, place in behind.items() if place >= upto]:
            # Nothing is awaited between looking at the hub and joining it, so there is neither gap nor repeat.
            join(topic)
            del behind[topic]
        if not behind:
            break
        after = min(behind.values())
        wanted = {*behind, *served.doubt_topics(behind)}
        changes = await event_log.read(after, upto, wanted, chunk)
        epoch = hub.position.epoch
        reached = changes[-1].seq if len(changes) >= chunk else upto
        valid, _ = served.sift(changes)  # the pump has reported the invalid ones
        payloads = []
        for topic, run in wire.runs(valid):
            if run[0].kind in (Kind.TRUNCATE, Kind.LOST):
                payloads += [
                    wire.reset(topic, change.kind.value, Position(epoch, change.seq))
                    for change in run
                    for topic in served.in_doubt(change, behind)
                    if behind[topic] < change.seq
                ]
                continue
            # A topic that joined the replay later, further on, has seen some of this already.
            place = behind.get(topic)
            fresh = [change for change in run if place is not None and change.seq > place]
            if fresh and place is not None:
                payloads.append(wire.changes(topic, Position(epoch, place), fresh))
                behind[topic] = fresh[-1].seq
                sent += len(fresh)
        for topic, place in behind.items():
            behind[topic] = max(place, reached)
        await reader.hear(payloads)
    return sent
