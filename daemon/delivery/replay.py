"""Replay: from a client's position to the head of the log. New, returning and slow clients all come this way."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from daemon.core import wire
from daemon.core.change import RESET_KINDS, Change, Numbers, Position, Seq, Topic
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.filters import Cells, View
from daemon.core.hub import Discontinuity, Hub
from daemon.core.ports import Batch, LogReader
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.snapshots import Snapshot
from daemon.logs import get_logger

log = get_logger()

MAX_CONCURRENT_READS = 4  # leaves database connections to the pump, however many clients are slow
SLICE: Final = 100  # changes that are validated, or sent, in one step: between steps, what is read ahead arrives
FEW: Final = 4  # replays that a user may run at once, each as fast as it can
SMALL_SLICE: Final = 20  # and if there are more
SMALL_READ: Final = 100
HEAD_START: Final = 0.002  # seconds before the next frame of the same user that waits, so as not to run together
LIVE_WEIGHT: Final = 2  # of the CPU of what takes turns while others get live changes, so that it delays them less
# Seconds of CPU that a read of the log takes, of Postgres and of this process, before anything is validated; and how
# much more for each change that it finds.
READ: Final = 0.001_4
READ_CHANGE: Final = 0.000_015


class ReplayTarget(Protocol):
    """The client that a replay is for."""

    @property
    def numbers(self) -> Numbers:
        """The form of the int8 and numeric values in its frames."""

    def send(self, payload: bytes) -> None:
        """Send this frame."""

    def send_encoded(self, frame: bytes) -> None:
        """Send a frame that is encoded already."""

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was sent."""

    def spend(self, seconds: float) -> None:
        """Count CPU towards the share of the user."""

    def lend(self, seconds: float) -> None:
        """Count CPU that the user takes in advance."""

    def has_credit(self) -> bool:
        """Whether the user may take more in advance."""

    def delay(self) -> float:
        """Seconds for which what is done for the user has to wait; 0 or less if it does not."""

    async def readable_topics(self) -> Mapping[Topic, Seq]:
        """Look up the rights to all topics that are behind, and leave those that may no longer be read.

        Returns the position from which on each of the others may be read.
        """

    def view(self, topic: Topic) -> View | None:
        """What it sees of a topic that is replayed, if not all."""

    def join(self, topic: Topic) -> None:
        """The topic is at the head: follow it live."""

    def too_slow(self, topic: Topic) -> None:
        """The snapshot of the topic was not taken in time: the topic is not replayed any more."""


class _Sending:
    """A snapshot on its way, of which so many frames have been `sent`. `deadline` is on the loop's clock."""

    __slots__ = ("deadline", "sent", "snapshot")

    def __init__(self, snapshot: Snapshot, deadline: float) -> None:
        self.snapshot = snapshot
        self.deadline = deadline
        self.sent = 0


class _Reading(NamedTuple):
    """A read of the log that has begun: of these topics, after this position, up to that one."""

    topics: frozenset[Topic]
    after: Seq
    upto: Seq
    discontinuity: Discontinuity | None
    batch: asyncio.Task[Batch]


class ReplayReader(Protocol):
    """What a replay needs of the log."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """See LogReader, except that LogUnavailable is never raised."""


class RetryingLogReader:
    """The log for all replays together: it limits how many read at once, and retries a read that failed.

    `wait_until_readable` waits until the log can be read, as far as is known.
    """

    def __init__(self, log_reader: LogReader, wait_until_readable: Callable[[], Awaitable[object]]) -> None:
        self._log = log_reader
        self._wait_until_readable = wait_until_readable
        self._reads = asyncio.Semaphore(MAX_CONCURRENT_READS)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """See ReplayReader. Raises LogTruncated."""
        while True:
            try:
                async with self._reads:
                    return await self._log.read_topics(topics, after, upto, limit)
            except LogUnavailable as error:
                log.debug("log_unavailable", reason=error.reason)  # the pump logs it at a higher level
            await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311
            await self._wait_until_readable()


class Turns:
    """The replays of one user, of which so many are `running`, and whose `turn` it is if they take turns.

    Only one of them reads at a time, so that what is delivered live finds a processor in Postgres. `weight` is what
    the CPU of those that take turns counts, times itself: more if something was delivered live since the turn before.
    """

    def __init__(self) -> None:
        self.running = 0
        self.turn = asyncio.Lock()
        self.reading = asyncio.Lock()
        self.weight = 1
        self._position: Position | None = None

    def begin(self, position: Position) -> None:
        """A turn begins, with the hub at this position."""
        self.weight = 1 if self._position in (None, position) else LIVE_WEIGHT
        self._position = position


class Replay:
    """Sends each topic what it missed, then lets all of them join the live stream.

    They join together: a client never gets a change of one topic before an older one of another. Topics may be added
    and removed while the replay runs. It holds at most two reads of `limit` changes in memory: while one of them is
    validated and sent, the next one is read.

    The few replays of a user go as fast as they can, on credit: `unpaid` is the CPU that this one took so, also of
    Postgres, and it does not count towards the user's share if the client reads what it asked for. Once there are
    many, or there is no credit, they take turns, read little at once, and what they take counts: many connections of
    one user get no more than a few, and others do not notice them, nor a user that asks again and again.

    A topic may begin with a snapshot of its rows. The changes that the rows contain are left out of what follows:
    those of transactions that the snapshot shows. All of them have been numbered, so no live change is one.
    """

    __slots__ = (
        "_ahead",
        "_discontinuity",
        "_hub",
        "_limit",
        "_log",
        "_places",
        "_router",
        "_sent_positions",
        "_snapshots",
        "_target",
        "_turns",
        "sent",
        "task",
        "unpaid",
    )

    def __init__(
        self,
        target: ReplayTarget,
        log_reader: ReplayReader,
        hub: Hub,
        router: PackRouter,
        *,
        limit: int = 1000,
        discontinuity: Discontinuity | None = None,
        turns: Turns | None = None,
    ) -> None:
        """`discontinuity` is the hub's last one when the places were valid. None: begin with a reset.

        `turns` are those of its user.
        """
        self.unpaid = 0.0  # seconds
        self._turns = turns or Turns()
        self.task: asyncio.Task[None] | None = None  # what runs it, for its owner
        self.sent = 0  # changes
        self._target = target
        self._log = log_reader
        self._hub = hub
        self._router = router
        self._limit = limit
        self._ahead: _Reading | None = None
        self._discontinuity = discontinuity
        self._places: dict[Topic, Seq] = {}  # where each topic is
        self._snapshots: dict[Topic, _Sending] = {}  # what some topics begin with
        self._sent_positions: dict[Topic, Seq] = {}  # the `prev` of each topic's next frame, if that is not its place

    def __contains__(self, topic: object) -> bool:
        return topic in self._places

    def __iter__(self) -> Iterator[Topic]:
        return iter(tuple(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def add(self, topic: Topic, place: Seq, last_frame: Seq | None = None) -> None:
        """Replay a topic from `place` on. `last_frame` is the position of its last frame, if not its place."""
        self._places[topic] = place
        if last_frame is not None:
            self._sent_positions[topic] = last_frame

    def add_snapshot(self, topic: Topic, snapshot: Snapshot, deadline: float) -> None:
        """Send a snapshot of a topic, until `deadline` on the loop's clock, and replay the topic from there."""
        self._snapshots[topic] = _Sending(snapshot, deadline)
        self.add(topic, snapshot.position.seq)

    def discard(self, topic: Topic) -> None:
        """Send nothing more of this topic."""
        self._places.pop(topic, None)
        self._sent_positions.pop(topic, None)
        self._snapshots.pop(topic, None)

    def stop(self) -> None:
        """Send nothing more, and cancel the task."""
        self._places.clear()
        self._sent_positions.clear()
        self._snapshots.clear()
        self._forget_ahead()
        if self.task is not None:
            self.task.cancel()
            self.task = None

    async def run(self) -> None:
        """Replay until every topic has joined or was removed."""
        try:
            await self._run()
        finally:
            self._forget_ahead()

    async def _run(self) -> None:
        while self._places:
            await self._target.drained()  # so that there is room for what is live
            # From here to the joining nothing is awaited: there is neither a gap nor a repeat.
            if self._hub.discontinuity is not self._discontinuity:
                await self._restart()
                continue
            if self._send_page():
                continue
            upto = self._hub.position.seq
            if all(place >= upto for place in self._places.values()):
                self._join()
                return
            await self._send_next(upto)

    async def _restart(self) -> None:
        """The numbers that were read may have been lost: reset every topic to where the hub continued."""
        discontinuity = self._hub.discontinuity
        rights = await self._target.readable_topics()
        if self._hub.discontinuity is discontinuity:
            self._reset_all(discontinuity.reason, discontinuity.position, rights)
            self._discontinuity = discontinuity

    def _send_page(self) -> bool:
        """Send the next frame of a snapshot; False if all have been sent."""
        for topic, sending in self._snapshots.items():
            frames = sending.snapshot.frames
            if frames is not None and sending.sent == len(frames):
                continue
            if frames is None or asyncio.get_running_loop().time() > sending.deadline:
                self.discard(topic)
                self._target.too_slow(topic)
            else:
                self._target.send_encoded(frames[sending.sent])
                sending.sent += 1
            return True
        return False

    def _join(self) -> None:
        for topic in self:
            self.discard(topic)
            self._target.join(topic)

    @property
    def _takes_turns(self) -> bool:
        return self._turns.running > FEW or not self._target.has_credit()

    async def _send_next(self, upto: Seq) -> None:
        """Read and send one batch, up to `upto`."""
        if self._takes_turns:
            async with self._turns.turn:
                self._turns.begin(self._hub.position)
                await self._rest()
                changes, reading = await self._read_next(upto)
        else:
            changes, reading = await self._read_next(upto)
        reached = {topic: self._places[topic] for topic in reading}
        for number, part in enumerate(_parts(changes)):
            if number:
                await asyncio.sleep(0)
            if self._hub.discontinuity is not self._discontinuity:
                return
            began = time.thread_time()
            # Looked at again and again while they are sent: a topic may be left, or revoked, before its frame's turn.
            still = {topic: place for topic, place in reading.items() if self._places.get(topic) == reached[topic]}
            frames = self._build_frames(part, still)
            self._count(time.thread_time() - began)
            for topic, payload in frames:
                if self._places.get(topic) == reached[topic]:
                    self._target.send(payload)
                    await self._target.drained()

    async def _read_next(self, upto: Seq) -> tuple[Sequence[Change], dict[Topic, Seq]]:
        """Read one batch, up to `upto`, and let every topic be where it ends.

        Returns what may be sent, and the topics that it is for, with the places from which on each of them gets it.
        """
        # Topics come and go while the log is read: the answer is for those that were asked about.
        asked = dict(self._places)
        if not asked:
            return [], {}
        for topic, place in asked.items():
            self._sent_positions[topic] = min(self._sent_positions.get(topic, place), place)
        wanted = frozenset((*asked, *self._router.wildcard_topics(asked)))
        reading = await self._reading(wanted, min(asked.values()), upto)
        self._count(READ)  # first, so that frames of the user wait until it has ended
        try:
            batch = await reading.batch
        except LogTruncated:
            if self._hub.discontinuity is self._discontinuity:
                self._reset_all("retention", self._hub.position, {})
            return [], {}
        if batch.more and not self._takes_turns:
            self._ahead = self._begin(wanted, batch.reached, upto)
        self._count(-READ if batch.validated else READ_CHANGE * len(batch))  # what is validated was in memory
        sendable = await self._sendable(batch)
        if self._hub.discontinuity is not self._discontinuity:
            return [], {}
        reading_from = {topic: place for topic, place in asked.items() if self._places.get(topic) == place}
        reached = batch.reached if batch.more else reading.upto
        self._places |= {topic: max(place, reached) for topic, place in reading_from.items()}
        return sendable, reading_from

    def _count(self, spent: float) -> None:
        """Count so many seconds of CPU; less than 0 gives back."""
        if self._takes_turns:
            self._target.spend(spent * self._turns.weight)
        else:
            self._target.lend(spent)
            self.unpaid += spent

    async def _rest(self) -> None:
        """Let others go first. One that takes turns also waits until its user may have more of the processor.

        Then it lets one of the user's frames that wait go first, and goes before the next one.
        """
        if self._takes_turns:
            await asyncio.sleep(max(0.0, self._target.delay()))
            await asyncio.sleep(max(0.0, self._target.delay() - HEAD_START))
        else:
            await asyncio.sleep(0)

    async def _reading(self, topics: frozenset[Topic], after: Seq, upto: Seq) -> _Reading:
        """The read that begins there: the one ahead, unless topics have changed, or numbers may have been lost."""
        ahead = self._ahead
        if ahead is not None:
            if (ahead.topics, ahead.after, ahead.discontinuity) == (topics, after, self._discontinuity):
                self._ahead = None
                return ahead
            await asyncio.wait([ahead.batch])  # to cancel it would cost its connection
            self._forget_ahead()
        return self._begin(topics, after, upto)

    def _begin(self, topics: frozenset[Topic], after: Seq, upto: Seq) -> _Reading:
        limit = min(self._limit, SMALL_READ) if self._takes_turns else self._limit
        batch = asyncio.create_task(self._read(topics, after, upto, limit))
        return _Reading(topics, after, upto, self._discontinuity, batch)

    async def _read(self, topics: frozenset[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        async with self._turns.reading:
            return await self._log.read_topics(topics, after, upto, limit)

    def _forget_ahead(self) -> None:
        """Cancel the read ahead. Nobody will look at how it ends."""
        if self._ahead is not None:
            self._ahead.batch.add_done_callback(lambda batch: batch.cancelled() or batch.exception())
            self._ahead.batch.cancel()
            self._ahead = None

    async def _sendable(self, batch: Batch) -> Sequence[Change]:
        """What of a batch may be sent, with pauses for what else there is to do."""
        if batch.validated:
            return batch
        found: list[Change] = []
        size = SMALL_SLICE if self._takes_turns else SLICE
        for first in range(0, len(batch), size):
            began = time.thread_time()
            found += self._router.validate(batch[first : first + size])[0]
            self._count(time.thread_time() - began)
            await self._rest()
        return found

    def _build_frames(self, changes: Sequence[Change], reading: Mapping[Topic, Seq]) -> list[tuple[Topic, bytes]]:
        """The frames of these changes for the topics in `reading`, each behind its place there."""
        frames: list[tuple[Topic, bytes]] = []
        cells: dict[Seq, Cells] = {}
        for topic, run in wire.runs(changes):
            last = run[-1]
            if last.kind in RESET_KINDS:
                for covered in self._router.topics_to_reset(last, reading):
                    if reading[covered] < last.seq and not all(self._is_contained(covered, change) for change in run):
                        frames.append((covered, self._reset(covered, last)))
                        self._sent_positions[covered] = last.seq
            # A topic whose place is further on has been sent some of this already.
            elif topic in reading and (fresh := self._fresh(topic, run, reading[topic])):
                view = self._target.view(topic)
                if view is not None:
                    fresh = view.of_run(fresh, cells)
                    if not fresh:
                        continue
                # A topic that was left and requested again from the same place has no last frame.
                prev = Position(self._hub.position.epoch, self._sent_positions.get(topic, reading[topic]))
                if self._target.numbers is Numbers.STRING:
                    fresh = list(map(self._router.with_exact_numbers, fresh))
                frames.append((topic, wire.changes(topic, prev, fresh, last.seq, has_tx=self._hub.has_tx)))
                self._sent_positions[topic] = last.seq
                self.sent += len(fresh)
        return frames

    def _fresh(self, topic: Topic, run: Sequence[Change], place: Seq) -> Sequence[Change]:
        """What of a run follows this place and is not contained in the topic's snapshot."""
        if run[0].seq > place and topic not in self._snapshots:
            return run
        return [change for change in run if change.seq > place and not self._is_contained(topic, change)]

    def _is_contained(self, topic: Topic, change: Change) -> bool:
        """Whether the snapshot that the topic began with contains the change."""
        sending = self._snapshots.get(topic)
        if sending is None or change.seq > sending.snapshot.upto:
            return False
        return sending.snapshot.visible.shows(change)

    def _reset_all(self, reason: str, position: Position, rights: Mapping[Topic, Seq]) -> None:
        """Reset every topic: what lies before this position, or before the right began, cannot be sent."""
        self._snapshots.clear()
        for topic in self:
            seq = max(position.seq, Seq(rights.get(topic, Seq(0)) - 1))
            self._target.send(wire.reset(topic, reason, Position(position.epoch, seq)))
            self._places[topic] = seq

    def _reset(self, topic: Topic, change: Change) -> bytes:
        return wire.reset(topic, change.kind.value, Position(self._hub.position.epoch, change.seq))


def _parts(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """Whole transactions, of SLICE changes or a few more together."""
    first = 0
    for end in range(1, len(changes) + 1):
        if end == len(changes) or (end - first >= SLICE and changes[end].tx != changes[end - 1].tx):
            yield changes[first:end]
            first = end
