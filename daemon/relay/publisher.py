"""What a member tells the gateways: every batch that the leader publishes, and how far each member is."""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from daemon import metrics
from daemon.core.batch import Beat, Contents, LogBatch, apart, hash_of, memory_of, size_of
from daemon.core.change import Change, Position, Seq
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.ports import LogReader
from daemon.relay import codec
from daemon.relay.codec import Following, Pull
from daemon.relay.link import Link
from daemon.relay.service import MAX_FOLLOWING

LOG: Final = "log"
"""The subject of the batches."""

CONTENT: Final = "t"
"""The first part of the subjects of contents that travel by topic; the second is the hash in hexadecimal digits."""

BEAT: Final = "beat"
"""The subject of the beats."""

SIGNALS: Final = "signals"
"""The subject of the signals, and of the news of who has come and gone."""

BEAT_INTERVAL: Final = 0.5  # seconds
MAX_MANIFEST: Final = 256 * 1024  # bytes: a larger batch has to be asked for, and so do larger contents
MAX_ENCODED: Final = 4 * MAX_MANIFEST  # bytes in memory: what is larger will not be small enough
MAX_HELD: Final = 16 * 2**20  # bytes of the newest batches, from which questions are answered
READ_CHUNK: Final = 1000  # changes


class Publisher:
    """Publishes the batches of this member while it leads, and answers for the newest ones, whoever led.

    `beat` says how far this member is. `batch_of` makes a batch of what was read of the log. If `by_topic`, contents
    are sent before their batch, to those who want them, and the batch goes to everybody without them.
    """

    def __init__(
        self,
        link: Link,
        log_reader: LogReader,
        beat: Callable[[], Beat],
        is_leading: Callable[[], bool],
        batch_of: Callable[[Position, Sequence[Change]], LogBatch],
        *,
        by_topic: bool = False,
    ) -> None:
        self._by_topic = by_topic
        self._link = link
        self._log = log_reader
        self._beat = beat
        self._is_leading = is_leading
        self._batch_of = batch_of
        self._held: deque[tuple[LogBatch, int]] = deque()  # with the size of each
        self._size = 0
        self._floor = Position("", Seq(0))  # what lies behind it is held

    def publish(self, batch: LogBatch) -> None:
        """Keep a batch that was published here, and send it to the gateways if this member leads."""
        size = memory_of(batch.changes)
        self._held.append((batch, size))
        self._size += size
        while self._size > MAX_HELD:
            self._drop_oldest()
        if not self._is_leading():
            return
        if self._by_topic:
            batch = self._send_contents(batch)
            size = memory_of(batch.changes)
        self._send(batch, size)

    def restart(self, position: Position) -> None:
        """What was held does not lead to this position, from which the log continues."""
        self._held.clear()
        self._size = 0
        self._floor = position

    def forget(self, floor: Seq) -> None:
        """Everything up to here is past retention: stop telling it."""
        while self._held and self._held[0][0].upto <= floor:
            self._drop_oldest()

    async def batches(self, after: Position) -> Following:
        """See MemberPorts."""
        beat = self._beat()
        head = Position(beat.epoch, beat.seq)
        if after.epoch != head.epoch:
            return Following(await self._log.head(), [])
        if after.seq >= head.seq:
            return Following(head, [])
        if self._floor.epoch == after.epoch and self._floor.seq <= after.seq:
            following = (batch.since(after.seq) for batch, _ in self._held if batch.upto > after.seq)
            return Following(head, _encoded(following))
        read = await self._log.read(after.seq, READ_CHUNK)
        known = [change for change in read if change.seq <= head.seq]  # how to read what is newer is not known yet
        if not known:
            return Following(head, [])
        return Following(head, [codec.LOG_BATCH.encode(self._batch_of(after, known))])

    def contents(self, after: Position, upto: Seq, hashes: Collection[int]) -> list[Change]:
        """See MemberPorts."""
        if self._floor.epoch != after.epoch or self._floor.seq > after.seq:
            raise LogTruncated
        found = list[Change]()
        for batch, _ in reversed(self._held):
            if batch.upto <= after.seq:
                break
            if batch.after < upto and batch.gone is None:
                raise LogTruncated  # a limit may stand for any topic
            if any(last < upto < first for last, first in batch.jumps):
                raise LogTruncated  # whoever asks knows of numbers that were undone
            found += [
                change
                for change in batch.changes
                if after.seq < change.seq <= upto and hash_of(change.topic) in hashes
            ]
        return sorted(found, key=lambda change: change.seq)

    async def run(self) -> None:
        """Beat until cancelled, and at once when the link is there."""
        while True:
            await self._link.connected.wait()
            self._link.publish(BEAT, codec.BEAT.encode(self._beat()))
            await asyncio.sleep(BEAT_INTERVAL)

    def _send_contents(self, batch: LogBatch) -> LogBatch:
        """Send the contents of a batch. Returns what is left of it, which says what they were."""
        batch, contents = apart(batch)
        sizes, messages, size = dict[int, int](), list[tuple[str, bytes]](), 0
        for topic_hash, changes in contents.items():
            sizes[topic_hash] = size_of(changes)
            message = b""
            if sizes[topic_hash] <= MAX_MANIFEST:
                message = codec.CONTENTS.encode(Contents(batch.epoch, batch.after, batch.upto, changes))
            if not 0 < len(message) <= MAX_MANIFEST:
                metrics.RELAY_CONTENTS.labels(result="too_large").inc()
                continue  # who wants it finds it missing
            messages.append((f"{CONTENT}.{topic_hash:016x}", message))
            size += len(message)
            if size > MAX_MANIFEST:
                self._send_together(messages)
                messages, size = [], 0
        self._send_together(messages)
        return batch._replace(absent=sizes)

    def _send_together(self, messages: Collection[tuple[str, bytes]]) -> None:
        is_sent = self._link.publish_all(messages)
        metrics.RELAY_CONTENTS.labels(result="sent" if is_sent else "dropped").inc(len(messages))

    def _drop_oldest(self) -> None:
        oldest, size = self._held.popleft()
        self._size -= size
        self._floor = Position(oldest.epoch, oldest.upto)

    def _send(self, batch: LogBatch, size: int) -> None:
        message = codec.MANIFEST.encode(batch) if size <= MAX_ENCODED else b""
        if not 0 < len(message) <= MAX_MANIFEST:
            message = codec.MANIFEST.encode(Pull(batch.epoch, batch.after, batch.upto))
        is_sent = self._link.publish(LOG, message)
        metrics.RELAY_BATCHES.labels(result="sent" if is_sent else "dropped").inc()


def _encoded(batches: Iterable[LogBatch]) -> list[bytes]:
    """The first batches, up to a little more than what one answer holds."""
    found, size = list[bytes](), 0
    for batch in batches:
        found.append(codec.LOG_BATCH.encode(batch))
        size += len(found[-1])
        if size > MAX_FOLLOWING:
            break
    return found


class NatsBroadcast:
    """Sends the signals of this process to all others. See Broadcast.

    `epoch` says of which history of which database they are.
    """

    def __init__(self, link: Link) -> None:
        self.epoch: Callable[[], str] = lambda: ""
        self._link = link

    async def __call__(self, pieces: Collection[str]) -> None:
        """Send all pieces, in order. Raises LogUnavailable."""
        for piece in pieces:
            if not self._link.publish(SIGNALS, piece.encode(), self.epoch()):
                raise LogUnavailable(self._link.failure or "too much waits to be sent to NATS")
