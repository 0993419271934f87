"""A gateway that gets contents only of the topics that it wants: a model of the rules, which are few.

Each batch has a manifest that goes to every gateway: the numbers, the ends, the deleted rows, the resets, and the
topics with content. Contents of each topic travel apart, before it. The position moves past a manifest only while
contents of all wanted topics are at hand; what is missing is asked for, and looked at again afterwards, since more
may be wanted by then.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from daemon.core.batch import Beat, LogBatch
from daemon.core.change import RESET_KINDS, Change, Position, Seq, Topic
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.ports import Batch
from daemon.delivery.contents import Interest
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.relay.codec import Pull
from daemon.relay.remote import RemoteLogReader

PAUSE: Final = 0.2
MANY: Final = 1000


class Content(NamedTuple):
    """The changes of one topic in one batch."""

    epoch: str
    after: Seq
    upto: Seq
    topic: Topic
    changes: Sequence[Change]


class Manifest(NamedTuple):
    """A batch without contents, and the topics that have some. Resets have none, and stay in the batch."""

    batch: LogBatch
    topics: Collection[Topic]


def split(batch: LogBatch) -> Sequence[Content | Manifest]:
    """The messages for a batch, in the order in which they are published."""
    contents: dict[Topic, list[Change]] = {}
    for change in batch.changes:
        if change.kind not in RESET_KINDS:
            contents.setdefault(change.topic, []).append(change)
    resets = [change for change in batch.changes if change.kind in RESET_KINDS]
    return [
        *(Content(*batch[:3], topic, changes) for topic, changes in contents.items()),
        Manifest(batch._replace(changes=resets), frozenset(contents)),
    ]


class TopicCache(LogCache):
    """A cache that answers only for topics that were wanted all the time since; the others are asked for."""

    wanted: dict[Topic, Position]

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        since = [self.wanted.get(topic) for topic in topics if not topic.startswith("*")]
        if all(one is not None and one.epoch == self._end.epoch and one.seq <= after for one in since):
            return await super().read_topics(topics, after, upto, limit)
        return await self._inner.read_topics(topics, after, upto, limit)


class TopicFeed:
    """Keeps the live end of a gateway at the head of the log. `wanted` says of each topic since when it is wanted."""

    def __init__(
        self, reader: RemoteLogReader, live: Live, _refresh: Callable[[], Awaitable[None]], _interest: Interest
    ) -> None:
        self.started, self.readable = asyncio.Event(), asyncio.Event()
        self.wanted: dict[Topic, Position] = {}
        self._reader, self._live = reader, live
        self._queue: list[Manifest] = []
        self._at_hand: dict[tuple[str, Seq, Seq, Topic], Sequence[Change]] = {}  # contents by batch and topic
        self._wakeup = asyncio.Event()
        self._is_behind = True

    def want(self, topic: Topic) -> None:
        """Somebody follows this topic from here on."""
        self.wanted.setdefault(topic, self._live.position)

    def unwant(self, topic: Topic) -> None:
        """Nobody has followed this topic for a while."""
        if topic not in self._live.hub.topics:
            self.wanted.pop(topic, None)

    def receive(self, message: LogBatch | Pull | Content | Manifest) -> None:
        match message:
            case Content():
                self._at_hand[*message[:4]] = message.changes
            case Manifest():
                self._queue.append(message)
            case LogBatch():
                for part in split(message):
                    self.receive(part)
            case Pull():
                self._is_behind = True
        self._step()
        self._wakeup.set()

    def record_beat(self, beat: Beat) -> None:
        position = self._live.position
        if beat.epoch == position.epoch and beat.floor > self._live.floor:
            self._live.forget(beat.floor)
        if not self.started.is_set() or beat.epoch != position.epoch or beat.seq > position.seq:
            self._is_behind = True
            self._wakeup.set()

    async def run(self) -> None:
        await self._wakeup.wait()
        while True:
            self._wakeup.clear()
            try:
                await self._catch_up()
                self.readable.set()
            except LogUnavailable:
                self._is_behind = True
                self.readable.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE):
                    await self._wakeup.wait()

    async def _catch_up(self) -> None:
        if not self.started.is_set():
            self._live.move(await self._reader.head(), "epoch")
            self.started.set()
        while True:
            self._step()
            before, first = self._live.position, self._first()
            if first is not None:
                await self._prepare(first)
            elif self._queue or self._is_behind:
                self._is_behind = False
                await self._ask(before)
            if self._live.position == before and (first is None or self._first() is not first):
                return

    def _first(self) -> Manifest | None:
        """The manifest that continues from the position, if it is there."""
        position = self._live.position
        if any(manifest.batch.epoch != position.epoch for manifest in self._queue):
            self._is_behind = True  # a member says whose epoch has ended
        self._queue = [
            manifest
            for manifest in self._queue
            if manifest.batch.epoch == position.epoch and manifest.batch.upto > position.seq
        ]
        return next((manifest for manifest in self._queue if self._continues(manifest)), None)

    def _continues(self, manifest: Manifest) -> bool:
        return manifest.batch.after <= self._live.position.seq

    def _missing(self, manifest: Manifest) -> list[Topic]:
        """The wanted topics whose contents are not at hand; those that nobody follows are not worth asking for."""
        missing = []
        for topic in [topic for topic in manifest.topics if topic in self.wanted]:
            if (*manifest.batch[:3], topic) not in self._at_hand:
                if topic in self._live.hub.topics:
                    missing.append(topic)
                else:
                    del self.wanted[topic]
        return missing

    def _step(self) -> None:
        """Publish what continues from the position and is complete, as far as nobody has to be asked for that."""
        while self.started.is_set() and (first := self._first()) is not None:
            if self._missing(first) or first.batch.since(self._live.position.seq).jumps:
                return
            self._publish(first)

    async def _prepare(self, manifest: Manifest) -> None:
        """Ask for what the manifest that comes next still needs, and publish it if that is enough."""
        position, batch = self._live.position, manifest.batch
        if batch.since(position.seq).jumps and await self._check_continuity(Position(batch.epoch, batch.upto)):
            return
        while self._live.position == position and (missing := self._missing(manifest)):
            await self._fetch(manifest, missing)
        if self._live.position == position:
            self._publish(manifest)

    async def _fetch(self, manifest: Manifest, topics: Sequence[Topic]) -> None:
        """Ask a member for the contents of these topics."""
        epoch, after, upto, *_ = manifest.batch
        begun = self._live.position
        try:
            found = await self._reader.read_topics(topics, max(after, begun.seq), upto, MANY)
        except LogTruncated:
            await self._check_continuity(begun)
            return
        if begun.epoch != epoch or found.more:
            raise LogUnavailable("not everything that is missing")
        for topic in topics:
            self._at_hand[epoch, after, upto, topic] = [
                change for change in found if change.topic == topic and change.kind not in RESET_KINDS
            ]

    def _publish(self, manifest: Manifest) -> None:
        """Everything that somebody wants of this batch is at hand."""
        changes = list(manifest.batch.changes)
        for topic in manifest.topics:
            if topic in self.wanted:
                changes += self._at_hand.get((*manifest.batch[:3], topic), ())
        changes.sort(key=lambda change: change.seq)
        self._live.publish(manifest.batch._replace(changes=changes).since(self._live.position.seq))
        position = self._live.position
        self._at_hand = {
            batch: changes
            for batch, changes in self._at_hand.items()
            if batch[0] == position.epoch and batch[2] > position.seq
        }

    async def _ask(self, position: Position) -> None:
        """Ask a member what follows the position."""
        try:
            head, batches = await self._reader.batches(position)
        except LogTruncated:
            await self._check_continuity(position)
            return
        for batch in batches:
            self.receive(batch)
        if batches:
            self._is_behind = True  # more may follow
        elif head != position:
            await self._check_continuity(head)

    async def _check_continuity(self, upto: Position) -> bool:
        """Continue from the head if the stream cannot be continued from the position. Returns whether it did."""
        position = self._live.position
        reason = await self._reader.continuity(position, upto)
        if reason is None:
            return False
        head = await self._reader.head()
        if self._live.position != position:
            self._is_behind = True
            return False
        self._queue.clear()
        self._at_hand.clear()
        self._live.move(head, reason)
        # What is followed is followed from here on; clients replay the rest.
        self.wanted.update(dict.fromkeys(self.wanted, head))
        return True
