"""The newest part of the log, held in memory: clients who come back all at once do not reach the database."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from sys import getsizeof

from daemon import metrics
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.ports import LogReader
from daemon.delivery.pack_router import Sifted

OVERHEAD = 900  # bytes that a change takes beside its key and its record, alone in its topic
PARTS = 64  # in so many parts the oldest changes go, one at a time

_seq, _kind = attrgetter("seq"), attrgetter("kind")


_Row = tuple[str, str, str]
"""Which row a change is about: its schema, its table, its key."""


class _Segment:
    """Neighbouring changes, by topic. `end` is the place of the last of them."""

    __slots__ = ("deleted", "end", "size", "topics")

    def __init__(self, end: Seq) -> None:
        self.topics: dict[Topic, list[Change]] = {}
        self.deleted: list[tuple[_Row, Seq]] = []
        self.size = 0
        self.end = end


class LogCache:
    """An LogReader over another one, which it asks only for what it does not hold.

    It holds what `add` is given since the last `restart`, of it the newest, up to `most_bytes`. Whoever moves the hub
    calls both in the same breath, so that the end of what is held is always the hub's position. What `read_topics`
    answers from memory has been sifted: it lacks what is sent to nobody.
    """

    def __init__(self, inner: LogReader, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self.restart(Position("", Seq(0)))

    def restart(self, position: Position) -> None:
        """Forget everything: what comes next follows this position."""
        self.size = 0  # bytes, more or less
        self._floor = position.seq
        self._end = position
        self._segments: deque[_Segment] = deque()
        # Between these places, both of them excluded, not every number is on record.
        self._jumps: deque[tuple[Seq, Seq]] = deque()
        # Of each row that was deleted, where it last was. Constant work, however many changes a row has had: its
        # content stays where it is, but no reader sees it.
        self._deleted: dict[_Row, Seq] = {}

    def add(self, changes: Sequence[Change], sifted: Sequence[Change]) -> None:
        """The hub has come to the end of `changes`, which go on from where it was; `sifted` may be sent.

        A jump of numbers among them must have been proven to be none of the log. Behind a transaction that is told
        as `limit` everything begins anew: which rows it deleted is not known.
        """
        end = Position(self._end.epoch, changes[-1].seq)
        if Kind.LIMIT in map(_kind, changes):
            self.restart(end)
            return
        if end.seq - self._end.seq != len(changes):
            before = self._end.seq
            for change in changes:
                if change.seq != before + 1:
                    self._jumps.append((before, change.seq))
                before = change.seq
        self._end = end
        for change in sifted:
            self._hold(change)
        for change in changes:  # of a row that was deleted by what its model refuses nothing is told either
            if change.kind is Kind.DELETE:
                self._forget(change)
        self._growing(0).end = end.seq
        while self.size > self._max_bytes:
            self._evict()

    def forget(self, floor: Seq) -> None:
        """What lies up to here is too old to be told any more."""
        while self._segments and self._segments[0].end <= floor:
            self._evict()
        self._floor = max(self._floor, min(floor, self._end.seq))

    async def head(self) -> Position:
        """See the port."""
        return await self._inner.head()

    async def read(self, after: Seq, limit: int) -> Sequence[Change]:
        """See the port. What is past the hub's position is never here."""
        return await self._inner.read(after, limit)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        """See the port."""
        if not self._floor <= after <= upto <= self._end.seq:
            metrics.RESUME_READS.labels(source="database").inc()
            return await self._inner.read_topics(topics, after, upto, limit)
        metrics.RESUME_READS.labels(source="memory").inc()
        found = Sifted()
        for change in self._past(after, upto, topics):
            if len(found) >= limit and change.tx != found[-1].tx:
                break
            found.append(change)
        return found

    async def continuity(self, since: Position) -> str | None:
        """See the port."""
        held = since.epoch == self._end.epoch and self._floor <= since.seq <= self._end.seq
        if not held or any(before < since.seq < after for before, after in self._jumps):
            metrics.RESUME_READS.labels(source="database").inc()
            return await self._inner.continuity(since)
        metrics.RESUME_READS.labels(source="memory").inc()
        return None

    def _past(self, after: Seq, upto: Seq, topics: Collection[Topic]) -> Iterator[Change]:
        """What is held of these topics, in order, without the content of rows that have been deleted since."""
        for segment in self._segments:
            if segment.end > after:
                found = [
                    change
                    for topic in topics
                    for change in segment.topics.get(topic, ())
                    if after < change.seq <= upto
                    and (change.record is None or self._deleted.get(_row(change), 0) < change.seq)
                ]
                found.sort(key=_seq)
                yield from found

    def _hold(self, change: Change) -> None:
        segment = self._growing(OVERHEAD + getsizeof(change.key) + getsizeof(change.record))
        segment.topics.setdefault(change.topic, []).append(change)
        segment.end = change.seq

    def _forget(self, change: Change) -> None:
        """The row has been deleted: what was told of it before is told to nobody any more."""
        row = _row(change)
        self._deleted[row] = change.seq
        self._growing(OVERHEAD).deleted.append((row, change.seq))

    def _growing(self, size: int) -> _Segment:
        """The newest segment, a new one if that has its part of all bytes; it becomes larger by `size`."""
        if not self._segments or self._segments[-1].size * PARTS > self._max_bytes:
            self._segments.append(_Segment(self._segments[-1].end if self._segments else self._floor))
        segment = self._segments[-1]
        segment.size += size
        self.size += size
        return segment

    def _evict(self) -> None:
        segment = self._segments.popleft()
        self.size -= segment.size
        self._floor = max(self._floor, segment.end)  # one that notes only deletions has no end of its own
        for row, seq in segment.deleted:
            if self._deleted[row] == seq:
                del self._deleted[row]
        while self._jumps and self._jumps[0][1] <= self._floor:
            self._jumps.popleft()


def _row(change: Change) -> _Row:
    return change.schema, change.table, change.key
