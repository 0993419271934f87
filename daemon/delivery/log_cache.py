"""The newest part of the log, in memory, so that a mass reconnect does not reach the database."""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from sys import getsizeof

from daemon import metrics
from daemon.core.batch import OVERHEAD, LogBatch, Unread
from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.ports import MAX_READ_BYTES, Batch, LogReader

SEGMENTS = 64  # about as many segments make up the cache; the oldest is evicted as a whole
MAX_CONTINUOUS = 10_000  # positions that are remembered, of those that the log can be continued from

_seq = attrgetter("seq")

_Row = tuple[str, str, str]
"""A row: its schema, its table, its key."""


class _Segment:
    """Consecutive changes, by topic. `end` is the position of the last one."""

    __slots__ = ("_places", "_topics", "deleted", "end", "size", "unread")

    def __init__(self, end: Seq) -> None:
        self._topics: dict[Topic, list[Change]] = {}
        self._places: dict[Topic, list[tuple[Unread, int]]] = {}  # of changes in topics that nobody has asked for
        self.unread: list[Unread] = []  # of which it is not known what topics they have
        self.deleted: list[tuple[_Row, Seq]] = []
        self.size = 0
        self.end = end

    def add(self, change: Change) -> None:
        self._topics.setdefault(change.topic, []).append(change)

    def of(self, topic: Topic) -> Sequence[Change]:
        """The changes of a topic, in any order."""
        self._sort()
        if found := self._places.pop(topic, ()):
            self._topics.setdefault(topic, []).extend(changes[place] for changes, place in found)
        return self._topics.get(topic, ())

    def all(self) -> Iterable[Change]:
        """All changes, in any order."""
        self._sort()
        return chain.from_iterable(map(self.of, self._topics.keys() | self._places.keys()))

    def _sort(self) -> None:
        for changes in self.unread:
            for topic, place in changes.places():
                self._places.setdefault(topic, []).append((changes, place))
        self.unread.clear()


class LogCache:
    """A LogReader in front of another one, which it asks only for what it does not hold.

    It holds the newest changes that were added since the last `restart`, up to `max_bytes`, without the records that
    were left in the log. `Live` calls `add` and `restart` in the same step in which it moves the hub, so the cache
    always ends at the hub's position. Batches read from memory are validated. `covers` says whether everything in
    some topics that follows a position has been added, if that is not so for all of them.

    What the other one says of a position before the hub's holds until the next `restart`: only a crash could change
    it, and that would take back the hub's position too. What is dropped meanwhile, `read_topics` notices. So clients
    that come back from one position ask once, however many they are.
    """

    def __init__(self, inner: LogReader, max_bytes: int) -> None:
        self.covers: Callable[[Collection[Topic], Seq], bool] | None = None
        self._inner = inner
        self._max_bytes = max_bytes
        self.restart(Position("", Seq(0)))

    def restart(self, position: Position) -> None:
        """Drop everything. The next changes follow this position."""
        self.size = 0  # bytes, approximately
        self._floor = position.seq
        self._end = position
        self._continuous: dict[Position, asyncio.Task[str | None]] = {}  # what is asked, or was answered with None
        self._segments: deque[_Segment] = deque()
        # Between these positions, both excluded, the log lacks some numbers.
        self._gaps: deque[tuple[Seq, Seq]] = deque()
        self._left: deque[tuple[Seq, Topic]] = deque()  # changes whose records were left in the log
        # Where each deleted row was last deleted. Earlier content stays in its segment, but no reader sees it: the
        # work is the same, however many changes the row has had.
        self._deleted: dict[_Row, Seq] = {}

    def add(self, batch: LogBatch) -> None:
        """Add what the hub has just published; the caller has proven that its jumps are not new terms.

        A batch whose deleted rows are unknown drops everything.
        """
        end = Position(batch.epoch, batch.upto)
        if batch.gone is None:
            self.restart(end)
            return
        self._gaps += batch.jumps
        self._end = end
        self._keep(batch.changes)
        for row in batch.gone:
            self._hide(row[:3], row.upto)
        self._newest_segment(0).end = end.seq
        while self.size > self._max_bytes:
            self._evict()

    def forget(self, floor: Seq) -> None:
        """Everything up to here is past retention: stop sending it."""
        while self._segments and self._segments[0].end <= floor:
            self._evict()
        self._floor = max(self._floor, min(floor, self._end.seq))
        for since in [since for since in self._continuous if since.seq < floor]:
            del self._continuous[since]

    def newest(self, limit: int) -> list[Change]:
        """The newest changes that are in memory, at most `limit`, in order."""
        found: list[Change] = []
        for segment in reversed(self._segments):
            found += segment.all()
            if len(found) >= limit:
                break
        found.sort(key=_seq)
        return found[-limit:]

    async def head(self) -> Position:
        """See LogReader."""
        return await self._inner.head()

    async def read(self, after: Seq, limit: int) -> Batch:
        """See LogReader. What is past the hub's position is never in memory."""
        return await self._inner.read(after, limit)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """See LogReader."""
        is_held = self._floor <= after <= upto <= self._end.seq
        is_left = any(after < seq <= upto and topic in topics for seq, topic in self._left)
        if not is_held or is_left or (self.covers is not None and not self.covers(topics, after)):
            metrics.RESUME_READS.labels(source="database").inc()
            return await self._inner.read_topics(topics, after, upto, limit)
        metrics.RESUME_READS.labels(source="memory").inc()
        found, size = Batch(validated=True), 0
        for change in self._held(after, upto, topics):
            if (len(found) >= limit or size >= MAX_READ_BYTES) and change.tx != found[-1].tx:
                found.more = True
                break
            found.append(change)
            size += len(change.record or "")
        return found

    async def continuity(self, since: Position) -> str | None:
        """See LogReader."""
        passed = since.epoch == self._end.epoch and since.seq <= self._end.seq
        held = passed and self._floor <= since.seq
        if held and not any(before < since.seq < after for before, after in self._gaps):
            metrics.RESUME_READS.labels(source="memory").inc()
            return None
        known = self._continuous
        if passed and since in known:
            metrics.RESUME_READS.labels(source="memory").inc()
            return await asyncio.shield(known[since])  # others wait for it, too
        metrics.RESUME_READS.labels(source="database").inc()
        if not passed:
            return await self._inner.continuity(since)
        asking = known[since] = asyncio.create_task(self._ask(since, known))
        asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # perhaps nobody waits
        return await asyncio.shield(asking)

    async def _ask(self, since: Position, known: dict[Position, asyncio.Task[str | None]]) -> str | None:
        """Ask, and remember nothing but that the log can be continued from there."""
        reason: str | None = "failed"
        try:
            reason = await self._inner.continuity(since)
        finally:
            if reason is not None:
                known.pop(since, None)
            elif len(known) > MAX_CONTINUOUS:
                del known[next(iter(known))]
        return reason

    def _held(self, after: Seq, upto: Seq, topics: Collection[Topic]) -> Iterator[Change]:
        """The changes of these topics, in order, without the content of rows that have been deleted since."""
        for segment in self._segments:
            if segment.end > after:
                found = [
                    change
                    for topic in topics
                    for change in segment.of(topic)
                    if after < change.seq <= upto
                    and (change.record is None or self._deleted.get(_row(change), 0) < change.seq)
                ]
                found.sort(key=_seq)
                yield from found

    def _keep(self, changes: Sequence[Change]) -> None:
        if type(changes) is Unread and changes:
            size = changes.size + OVERHEAD * len(changes)
            if size * SEGMENTS <= self._max_bytes:
                segment = self._newest_segment(size)
                segment.unread.append(changes)
                segment.end = changes[-1].seq
                return
        segment = self._newest_segment(0)
        for change in changes:
            size = OVERHEAD + getsizeof(change.key) + getsizeof(change.record)
            if change.outline is not None:
                size += getsizeof(change.outline.text)
                if change.is_left:
                    self._left.append((change.seq, change.topic))
            if segment.size * SEGMENTS > self._max_bytes:
                segment = self._newest_segment(0)
            segment.size += size
            self.size += size
            segment.add(change)
            segment.end = change.seq

    def _hide(self, row: _Row, seq: Seq) -> None:
        """Hide the content of the row up to this position."""
        self._deleted[row] = seq
        self._newest_segment(OVERHEAD).deleted.append((row, seq))

    def _newest_segment(self, size: int) -> _Segment:
        """The segment to add `size` bytes to: the newest one, or a new one if that is full."""
        if not self._segments or self._segments[-1].size * SEGMENTS > self._max_bytes:
            self._segments.append(_Segment(self._segments[-1].end if self._segments else self._floor))
        segment = self._segments[-1]
        segment.size += size
        self.size += size
        return segment

    def _evict(self) -> None:
        segment = self._segments.popleft()
        self.size -= segment.size
        self._floor = max(self._floor, segment.end)  # a segment with nothing but deletions has no end of its own
        for row, seq in segment.deleted:
            if self._deleted[row] == seq:
                del self._deleted[row]
        while self._gaps and self._gaps[0][1] <= self._floor:
            self._gaps.popleft()
        while self._left and self._left[0][0] <= self._floor:
            self._left.popleft()


def _row(change: Change) -> _Row:
    return change.schema, change.table, change.key
