"""From a client's position to the head: the one way for everybody who is behind."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from daemon.core import wire
from daemon.core.change import DOUBTS, Change, Position, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.ports import EventLog
from daemon.flow.served import Served


class Reader(Protocol):
    """Who is behind, and hears what it missed."""

    async def hear(self, payloads: Iterable[bytes]) -> None:
        """Send these frames, in order, each when the peer has taken most of those before."""


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
    breaks = hub.breaks
    told: dict[Topic, Seq] = {}  # of each topic, the position of its last frame: the `prev` of the next
    while behind:
        upto = hub.position.seq
        for topic in [topic for topic, place in behind.items() if place >= upto]:
            # Nothing is awaited between looking at the hub and joining it, so there is neither gap nor repeat.
            join(topic)
            del behind[topic]
        if not behind:
            break
        # Topics come and go while the log is read: what was read is for those that were asked about.
        asked = dict(behind)
        told |= {topic: min(told.get(topic, place), place) for topic, place in asked.items()}
        wanted = {*asked, *served.doubt_topics(asked)}
        changes = await event_log.read_topics(wanted, min(asked.values()), upto, chunk)
        if hub.breaks != breaks:
            breaks = hub.breaks
            await reader.hear(_anew(behind, join, hub))
            continue
        reached = changes[-1].seq if len(changes) >= chunk else upto
        reading = {topic: place for topic, place in asked.items() if behind.get(topic) == place}
        payloads: list[tuple[Topic, bytes]] = []
        for topic, run in wire.runs(served.sift(changes)[0]):  # the pump has reported the invalid ones
            last = run[-1]
            if last.kind in DOUBTS:
                for covered in served.in_doubt(last, reading):
                    if reading[covered] < last.seq:
                        payloads.append((covered, _reset(hub, covered, last)))
                        told[covered] = last.seq
            # A topic whose place lies further on has been told some of this already.
            elif topic in reading and (fresh := [change for change in run if change.seq > reading[topic]]):
                prev = Position(hub.position.epoch, told[topic])
                payloads.append((topic, wire.changes(topic, prev, fresh)))
                told[topic] = fresh[-1].seq
                sent += len(fresh)
        places = {topic: max(place, reached) for topic, place in reading.items()}
        behind |= places
        # Asked frame by frame, while they are sent: a topic may be left, or be lost, before its frame's turn.
        await reader.hear(payload for topic, payload in payloads if behind.get(topic) == places[topic])
    return sent


def _anew(behind: dict[Topic, Seq], join: Callable[[Topic], None], hub: Hub) -> Iterator[bytes]:
    """Join every topic with a reset: the numbers that were asked about may have been lost, and name nothing now.

    Each joins as its reset is sent, so that no live frame comes before it.
    """
    for topic in tuple(behind):
        if behind.pop(topic, None) is not None:
            join(topic)
            yield wire.reset(topic, hub.broken, hub.position)


def _reset(hub: Hub, topic: Topic, change: Change) -> bytes:
    return wire.reset(topic, change.kind.value, Position(hub.position.epoch, change.seq))
