"""From a client's position to the head: the one way for everybody who is behind."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol

from daemon.core import wire
from daemon.core.change import RESET_KINDS, Change, Position, Seq, Topic
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.hub import Hub
from daemon.core.ports import LogReader
from daemon.delivery.pack_router import PackRouter
from daemon.logs import get_logger

log = get_logger()

READERS = 4  # replays that read the log at once: they leave connections to the pump, however many clients are slow


class Reader(Protocol):
    """Who is behind, and hears what it missed."""

    def tell(self, payload: bytes) -> None:
        """Send this frame."""

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was sent."""

    async def look_up_rights(self) -> Mapping[Topic, Seq]:
        """Leave the topics that may no longer be read: their rights may have ended where nobody saw it.

        Returns where the rights to the others began.
        """


class History(Protocol):
    """What a replay needs of the log."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        """As in the LogReader."""


class RetryingLogReader:
    """The log, for all replays together: some read at a time, and a read that failed is tried again.

    `readable` waits until the log can be read, as far as is known.
    """

    def __init__(self, log_reader: LogReader, readable: Callable[[], Awaitable[object]]) -> None:
        self._log = log_reader
        self._readable = readable
        self._turns = asyncio.Semaphore(READERS)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        """As in the LogReader, but that it does not fail."""
        while True:
            try:
                async with self._turns:
                    return await self._log.read_topics(topics, after, upto, limit)
            except LogUnavailable as error:
                log.debug("log_unavailable", reason=error.reason)  # the pump says so louder
            await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311
            await self._readable()


async def replay(
    behind: dict[Topic, Seq],
    reader: Reader,
    join: Callable[[Topic], None],
    *,
    log_reader: History,
    hub: Hub,
    router: PackRouter,
    chunk: int = 1000,
    told: dict[Topic, Seq] | None = None,
    breaks: int | None = None,
) -> int:
    """Send what each topic in `behind` missed since its place there, then let all of them `join` the live stream.

    They join together: nobody hears of one topic what is newer than what it has still to hear of another. `behind`
    may gain and lose topics while this runs; it is empty at the end. `told` has, where that is not its place, the
    position of a topic's last frame: the `prev` of the next. `breaks` is what the hub had counted when the places
    were good, if that is not now. Returns how many changes were sent. Memory is bounded by one chunk. Raises
    LogUnavailable.
    """
    sent = 0
    breaks = hub.breaks if breaks is None else breaks
    told = {} if told is None else told
    while behind:
        await reader.drained()  # whoever joins has room for what is live
        # From here to the joining nothing is awaited, so there is neither gap nor repeat.
        if hub.breaks != breaks:
            # The numbers that were asked about may have been lost, and name nothing now.
            breaks = hub.breaks
            rights = await reader.look_up_rights()
            if hub.breaks == breaks:
                _begin_anew(behind, reader, hub.broken, hub.begun, rights)
        if hub.breaks != breaks:
            continue
        upto = hub.position.seq
        if all(place >= upto for place in behind.values()):
            for topic in tuple(behind):
                del behind[topic]
                told.pop(topic, None)
                join(topic)
            break
        # Topics come and go while the log is read: what was read is for those that were asked about.
        asked = dict(behind)
        told |= {topic: min(told.get(topic, place), place) for topic, place in asked.items()}
        wanted = {*asked, *router.wildcard_topics(asked)}
        try:
            changes = await log_reader.read_topics(wanted, min(asked.values()), upto, chunk)
        except LogTruncated:
            if hub.breaks == breaks:
                _begin_anew(behind, reader, "retention", hub.position, {})
            continue
        if hub.breaks != breaks:
            continue
        reached = changes[-1].seq if len(changes) >= chunk else upto
        reading = {topic: place for topic, place in asked.items() if behind.get(topic) == place}
        payloads: list[tuple[Topic, bytes]] = []
        for topic, run in wire.runs(router.validate(changes)[0]):  # the pump has reported the invalid ones
            last = run[-1]
            if last.kind in RESET_KINDS:
                for covered in router.topics_to_reset(last, reading):
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
        for topic, payload in payloads:
            # Asked frame by frame, while they are sent: a topic may be left, or be lost, before its frame's turn.
            if behind.get(topic) == places[topic]:
                reader.tell(payload)
                await reader.drained()
    return sent


def _begin_anew(
    behind: dict[Topic, Seq], reader: Reader, reason: str, position: Position, rights: Mapping[Topic, Seq]
) -> None:
    """What lies before this position cannot be told any more, nor what lies before the right."""
    for topic in behind:
        seq = max(position.seq, Seq(rights.get(topic, Seq(0)) - 1))
        reader.tell(wire.reset(topic, reason, Position(position.epoch, seq)))
        behind[topic] = seq


def _reset(hub: Hub, topic: Topic, change: Change) -> bytes:
    return wire.reset(topic, change.kind.value, Position(hub.position.epoch, change.seq))
